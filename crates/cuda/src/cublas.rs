//! cuBLAS, the baseline of the benchmarks and the library GEMM of long prompts.

use std::ffi::{c_int, c_void};

use cudarc::cublas::{result as blas, sys as blas_sys};
use cudarc::cublaslt::{result as lt, sys as lt_sys};

use crate::bench::{self, Effort, Job, Timing};
use crate::buffer::DeviceBuffer;
use crate::error::{Error, Result};
use crate::stream::{Stream, check_length};

/// What both libraries may use, in bytes.
const WORKSPACE_BYTES: usize = 64 << 20;
/// Algorithms of cublasLt to try.
const N_HEURISTICS: usize = 8;

/// Element type of weights, activations and result; sums are FP32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Half {
    /// bfloat16.
    Bf16,
    /// IEEE half precision.
    F16,
}

/// Sides of a product `y[m, n] = x[m, k] * w[n, k]^T`, all row-major.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Tokens.
    pub m: usize,
    /// Rows of the weights.
    pub n: usize,
    /// Columns of the weights.
    pub k: usize,
}

/// A way to multiply.
#[derive(Clone)]
pub enum Algorithm {
    /// cublasGemmEx with its own choice.
    GemmEx,
    /// cublasLtMatmul with the heuristic of this number.
    Lt(usize, lt_sys::cublasLtMatmulAlgo_t),
}

impl Algorithm {
    /// Such as `cublasGemmEx` or `cublasLt heuristic 3`.
    #[must_use]
    pub fn name(&self) -> String {
        match self {
            Self::GemmEx => "cublasGemmEx".to_owned(),
            Self::Lt(index, _) => format!("cublasLt heuristic {index}"),
        }
    }
}

/// Handles on both libraries, for one stream.
pub struct Cublas<'a> {
    stream: &'a Stream,
    blas: blas_sys::cublasHandle_t,
    lt: lt_sys::cublasLtHandle_t,
    workspace: DeviceBuffer<u8>,
}

impl<'a> Cublas<'a> {
    /// Loads the libraries; takes about a second.
    ///
    /// # Errors
    ///
    /// [`Error::NoLibrary`] if one is not on this system.
    pub fn new(stream: &'a Stream) -> Result<Self> {
        // SAFETY: these only open and close libraries.
        let (has_blas, has_lt) =
            unsafe { (blas_sys::is_culib_present(), lt_sys::is_culib_present()) };
        if !has_blas {
            return Err(Error::NoLibrary("libcublas"));
        }
        if !has_lt {
            return Err(Error::NoLibrary("libcublasLt"));
        }
        stream.device().bind()?;
        let workspace = DeviceBuffer::new(stream.device(), WORKSPACE_BYTES)?;
        let blas = check("cublasCreate", blas::create_handle())?;
        let lt = match check("cublasLtCreate", lt::create_handle()) {
            Ok(lt) => lt,
            Err(error) => {
                // SAFETY: it was created above.
                let _ = unsafe { blas::destroy_handle(blas) };
                return Err(error);
            }
        };
        let this = Self { stream, blas, lt, workspace };
        // SAFETY: the handle lives; the stream lives as long as `self`.
        check("cublasSetStream", unsafe { blas::set_stream(this.blas, stream.raw().cast()) })?;
        // SAFETY: the workspace has that size and lives as long as `self`.
        let status = unsafe {
            blas_sys::cublasSetWorkspace_v2(
                this.blas,
                this.workspace.address() as *mut c_void,
                WORKSPACE_BYTES,
            )
        };
        check("cublasSetWorkspace", status.result())?;
        Ok(this)
    }

    /// Prepares a product.
    ///
    /// # Errors
    ///
    /// What the libraries report.
    pub fn product(&self, shape: Shape, half: Half) -> Result<Product<'_>> {
        Product::new(self, shape, half, None)
    }

    /// Prepares a product that leaves SMs of the GPU to others: the algorithms
    /// are those of cublasLt for `n_sms` SMs.
    ///
    /// # Errors
    ///
    /// What the libraries report, and if cublasLt has no algorithm.
    pub fn product_on(&self, n_sms: u32, shape: Shape, half: Half) -> Result<Product<'_>> {
        let product = Product::new(self, shape, half, Some(n_sms))?;
        if product.algorithms.is_empty() {
            let status = "no algorithm can do this product".to_owned();
            return Err(Error::Cublas { call: "cublasLtMatmulAlgoGetHeuristic", status });
        }
        Ok(product)
    }
}

impl Drop for Cublas<'_> {
    fn drop(&mut self) {
        let _ = self.stream.synchronize();
        // SAFETY: both were created by `new` and are destroyed once.
        unsafe {
            let _ = blas::destroy_handle(self.blas);
            let _ = lt::destroy_handle(self.lt);
        }
    }
}

/// A product of certain sides, with the algorithms that can do it.
pub struct Product<'a> {
    cublas: &'a Cublas<'a>,
    shape: Shape,
    half: Half,
    descriptor: lt_sys::cublasLtMatmulDesc_t,
    /// Weights, activations, result.
    layouts: [lt_sys::cublasLtMatrixLayout_t; 3],
    algorithms: Vec<Algorithm>,
}

impl<'a> Product<'a> {
    fn new(cublas: &'a Cublas<'a>, shape: Shape, half: Half, n_sms: Option<u32>) -> Result<Self> {
        let Shape { m, n, k } = shape;
        let data = half.lt();
        let layout = |rows: usize, cols: usize| {
            let made = lt::create_matrix_layout(data, rows as u64, cols as u64, rows as i64);
            check("cublasLtMatrixLayoutCreate", made)
        };
        // Column-major: y^T [n, m] = (w^T [k, n])^T * x^T [k, m].
        let layouts = [layout(k, n)?, layout(k, m)?, layout(n, m)?];
        let descriptor = lt::create_matmul_desc(
            lt_sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            lt_sys::cudaDataType::CUDA_R_32F,
        );
        let descriptor = check("cublasLtMatmulDescCreate", descriptor)?;
        // cublasGemmEx does not know of the limit.
        let algorithms = if n_sms.is_none() { vec![Algorithm::GemmEx] } else { Vec::new() };
        let mut this = Self { cublas, shape, half, descriptor, layouts, algorithms };
        type Attribute = lt_sys::cublasLtMatmulDescAttributes_t;
        let transposed = blas_sys::cublasOperation_t::CUBLAS_OP_T as i32;
        let limit =
            n_sms.map(|n_sms| (Attribute::CUBLASLT_MATMUL_DESC_SM_COUNT_TARGET, n_sms as i32));
        let transpose = (Attribute::CUBLASLT_MATMUL_DESC_TRANSA, transposed);
        for (attribute, value) in [transpose].into_iter().chain(limit) {
            // SAFETY: the descriptor lives; the value, of 32 bits, is copied.
            let set = unsafe {
                lt::set_matmul_desc_attribute(
                    descriptor,
                    attribute,
                    (&raw const value).cast(),
                    size_of::<i32>(),
                )
            };
            check("cublasLtMatmulDescSetAttribute", set)?;
        }
        this.algorithms.extend(this.heuristics()?);
        Ok(this)
    }

    fn heuristics(&self) -> Result<Vec<Algorithm>> {
        let preference = check("cublasLtMatmulPreferenceCreate", lt::create_matmul_pref())?;
        // SAFETY: a plain C struct, for which all zeros are a value.
        let zero: lt_sys::cublasLtMatmulHeuristicResult_t = unsafe { std::mem::zeroed() };
        let mut found = [zero; N_HEURISTICS];
        let mut n_found = 0;
        let workspace_bytes = WORKSPACE_BYTES;
        let [weights, x, y] = self.layouts;
        // SAFETY: all descriptors live; sizes are those of the values, which are copied.
        let status = unsafe {
            let set = lt::set_matmul_pref_attribute(
                preference,
                lt_sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                (&raw const workspace_bytes).cast(),
                size_of::<usize>(),
            );
            let status = set.and_then(|()| {
                lt_sys::cublasLtMatmulAlgoGetHeuristic(
                    self.cublas.lt,
                    self.descriptor,
                    weights,
                    x,
                    y,
                    y,
                    preference,
                    N_HEURISTICS as c_int,
                    found.as_mut_ptr(),
                    &raw mut n_found,
                )
                .result()
            });
            let _ = lt::destroy_matmul_pref(preference);
            status
        };
        // None that fits is no error: cublasGemmEx remains.
        if status.is_err() && n_found == 0 {
            return Ok(Vec::new());
        }
        let fit = found.iter().take(n_found.max(0) as usize).enumerate();
        let fit =
            fit.filter(|(_, result)| result.state == lt_sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS);
        Ok(fit.map(|(index, result)| Algorithm::Lt(index, result.algo)).collect())
    }

    /// The algorithms: cublasGemmEx first (if no SMs are left to others), then up
    /// to 8 of cublasLt.
    #[must_use]
    pub fn algorithms(&self) -> &[Algorithm] {
        &self.algorithms
    }

    /// Multiplies: weights `[n, k]`, activations `[m, k]`, result `[m, n]`,
    /// addresses of row-major elements on the GPU.
    ///
    /// # Errors
    ///
    /// What the libraries report.
    ///
    /// # Safety
    ///
    /// The addresses are of allocations of those sizes, 16-byte aligned, that
    /// live and are not used otherwise until the product is done.
    pub unsafe fn launch(&self, algorithm: &Algorithm, weights: u64, x: u64, y: u64) -> Result<()> {
        self.cublas.stream.device().bind()?;
        let (one, zero) = (1.0_f32, 0.0_f32);
        let (alpha, beta): (*const c_void, *const c_void) =
            ((&raw const one).cast(), (&raw const zero).cast());
        let (weights, x, y) = (weights as *const c_void, x as *const c_void, y as *mut c_void);
        let Shape { m, n, k } = self.shape;
        match algorithm {
            Algorithm::GemmEx => {
                let data = self.half.blas();
                // SAFETY: the sides are those of the caller's memory; scalars are on the host.
                let status = unsafe {
                    blas::gemm_ex(
                        self.cublas.blas,
                        blas_sys::cublasOperation_t::CUBLAS_OP_T,
                        blas_sys::cublasOperation_t::CUBLAS_OP_N,
                        n as c_int,
                        m as c_int,
                        k as c_int,
                        alpha,
                        weights,
                        data,
                        k as c_int,
                        x,
                        data,
                        k as c_int,
                        beta,
                        y,
                        data,
                        n as c_int,
                        blas_sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                        blas_sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
                    )
                };
                check("cublasGemmEx", status)
            }
            Algorithm::Lt(_, algorithm) => {
                let [weights_layout, x_layout, y_layout] = self.layouts;
                // SAFETY: the layouts are those of the caller's memory; scalars are on the host.
                let status = unsafe {
                    lt::matmul(
                        self.cublas.lt,
                        self.descriptor,
                        alpha,
                        beta,
                        weights,
                        weights_layout,
                        x,
                        x_layout,
                        y,
                        y_layout,
                        y,
                        y_layout,
                        algorithm,
                        self.cublas.workspace.address() as *mut c_void,
                        WORKSPACE_BYTES,
                        self.cublas.stream.raw().cast(),
                    )
                };
                check("cublasLtMatmul", status)
            }
        }
    }

    /// The sides.
    #[must_use]
    pub const fn shape(&self) -> Shape {
        self.shape
    }

    /// Multiplies: weights `[n, k]`, activations `[m, k]`, result `[m, n]`,
    /// row-major.
    ///
    /// # Errors
    ///
    /// [`Error::Length`], and what the libraries report.
    pub fn multiply(
        &self,
        algorithm: &Algorithm,
        weights: &DeviceBuffer<u16>,
        x: &DeviceBuffer<u16>,
        y: &mut DeviceBuffer<u16>,
    ) -> Result<()> {
        self.check_lengths(weights, x, y)?;
        // SAFETY: the buffers have the sizes; freeing them waits for the product.
        unsafe { self.launch(algorithm, weights.address(), x.address(), y.address()) }
    }

    /// The stream that it is given to.
    #[must_use]
    pub const fn stream(&self) -> &Stream {
        self.cublas.stream
    }

    /// Element type.
    #[must_use]
    pub const fn half(&self) -> Half {
        self.half
    }

    /// Times every algorithm and returns the fastest. `weights` are copies of
    /// the same matrix, [`bench::n_copies`] of them, so that they are read cold.
    ///
    /// # Errors
    ///
    /// [`Error::Length`], and what the libraries report.
    pub fn time(
        &self,
        weights: &[DeviceBuffer<u16>],
        x: &DeviceBuffer<u16>,
        y: &mut DeviceBuffer<u16>,
        effort: Effort,
    ) -> Result<(Algorithm, Timing)> {
        check_length("copies of the weights", weights.len(), weights.len().max(1))?;
        weights.iter().try_for_each(|weights| self.check_lengths(weights, x, y))?;
        let weights: Vec<u64> = weights.iter().map(DeviceBuffer::address).collect();
        // SAFETY: the buffers have the sizes and live until this returns.
        unsafe { self.fastest(&weights, x.address(), y.address(), effort) }
    }

    fn check_lengths(
        &self,
        weights: &DeviceBuffer<u16>,
        x: &DeviceBuffer<u16>,
        y: &DeviceBuffer<u16>,
    ) -> Result<()> {
        let Shape { m, n, k } = self.shape;
        check_length("weights", weights.len(), n * k)?;
        check_length("activations", x.len(), m * k)?;
        check_length("result", y.len(), m * n)
    }

    /// Times every algorithm with weights that are read cold, and returns the
    /// fastest: `weights` are addresses of equal copies.
    ///
    /// # Errors
    ///
    /// What the libraries report.
    ///
    /// # Safety
    ///
    /// As for [`Product::launch`].
    unsafe fn fastest(
        &self,
        weights: &[u64],
        x: u64,
        y: u64,
        effort: Effort,
    ) -> Result<(Algorithm, Timing)> {
        // An algorithm that cannot do it after all says so at its first launch.
        let able: Vec<&Algorithm> = self
            .algorithms
            .iter()
            // SAFETY: the caller's promise.
            .filter(|algorithm| unsafe { self.launch(algorithm, weights[0], x, y) }.is_ok())
            .collect();
        self.cublas.stream.synchronize()?;
        let jobs: Vec<Job<'_>> = able
            .iter()
            .map(|algorithm| -> Job<'_> {
                Box::new(|_, i| {
                    // SAFETY: the caller's promise.
                    unsafe { self.launch(algorithm, weights[i % weights.len()], x, y) }
                })
            })
            .collect();
        // SAFETY: the caller's promise.
        let timings = unsafe {
            bench::interleaved(self.cublas.stream, &jobs, &vec![weights.len(); jobs.len()], effort)
        }?;
        let fastest =
            able.iter().zip(timings).min_by(|(_, a), (_, b)| a.median().total_cmp(&b.median()));
        let (algorithm, timing) = fastest.ok_or_else(|| Error::Cublas {
            call: "cublasGemmEx",
            status: "no algorithm can do this product".to_owned(),
        })?;
        Ok(((*algorithm).clone(), timing))
    }
}

impl Drop for Product<'_> {
    fn drop(&mut self) {
        // SAFETY: they were created by `new` and are destroyed once.
        unsafe {
            for layout in self.layouts {
                let _ = lt::destroy_matrix_layout(layout);
            }
            let _ = lt::destroy_matmul_desc(self.descriptor);
        }
    }
}

impl std::fmt::Debug for Algorithm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.name())
    }
}

impl Half {
    const fn blas(self) -> blas_sys::cudaDataType {
        match self {
            Self::Bf16 => blas_sys::cudaDataType::CUDA_R_16BF,
            Self::F16 => blas_sys::cudaDataType::CUDA_R_16F,
        }
    }

    const fn lt(self) -> lt_sys::cudaDataType {
        match self {
            Self::Bf16 => lt_sys::cudaDataType::CUDA_R_16BF,
            Self::F16 => lt_sys::cudaDataType::CUDA_R_16F,
        }
    }
}

/// Names the call that failed.
fn check<T>(call: &'static str, result: std::result::Result<T, impl std::fmt::Debug>) -> Result<T> {
    result.map_err(|error| Error::Cublas { call, status: format!("{error:?}") })
}
