//! What can go wrong between this program and a GPU.

use cudarc::driver::DriverError;

/// Why something on a GPU failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The system has no library of the NVIDIA driver.
    #[error("no NVIDIA driver: libcuda is not on this system")]
    NoDriver,
    /// The driver is there and sees no GPU at all.
    #[error("no GPU: the NVIDIA driver sees none")]
    NoGpu,
    /// There is no GPU of that number.
    #[error("no GPU {ordinal}: the NVIDIA driver sees {count}")]
    NoSuchGpu {
        /// The number asked for, from 0.
        ordinal: usize,
        /// How many there are.
        count: usize,
    },
    /// The driver is older than the CUDA version that the kernels are made with.
    #[error("driver too old: it supports CUDA {}, expected {} or later", version(*.found), version(*.needed))]
    DriverTooOld {
        /// 1000 * major + 10 * minor.
        found: i32,
        /// Likewise.
        needed: i32,
    },
    /// This build holds no kernels for that GPU.
    #[error("no kernels for compute capability {}.{}: this build has {built}", .capability.0, .capability.1)]
    NoKernels {
        /// Of the GPU.
        capability: (u32, u32),
        /// The architectures compiled in.
        built: &'static str,
    },
    /// No kernel has that name.
    #[error("no kernel `{0}` in this build")]
    NoKernel(String),
    /// cuBLAS, which only benchmarks use as a baseline, is not on this system.
    #[error("{0} is not on this system")]
    NoLibrary(&'static str),
    /// A call of the driver failed.
    #[error("{call}: {name}")]
    Driver {
        /// The function called.
        call: &'static str,
        /// The driver's name of the error.
        name: String,
    },
    /// A call of cuBLAS failed.
    #[error("{call}: {status}")]
    Cublas {
        /// The function called.
        call: &'static str,
        /// The library's name of the error.
        status: String,
    },
    /// Slices or buffers do not have the lengths that the operation needs.
    #[error("{what}: {found} elements, expected {expected}")]
    Length {
        /// Of which argument.
        what: &'static str,
        /// Elements.
        found: usize,
        /// Elements.
        expected: usize,
    },
    /// An INT8 weight times its scale is not a finite FP16 number.
    #[error("INT8 weight {value} times scale {} does not fit FP16", f32::from_bits(*.scale_bits))]
    Overflow {
        /// The weight.
        value: i8,
        /// Its scale, as bits of an `f32`.
        scale_bits: u32,
    },
    /// A chunk of fixed-rate weights that is not valid.
    #[error("chunk {chunk}: {what}")]
    BadChunk {
        /// Number of the chunk: from left to right, then down.
        chunk: usize,
        /// What is wrong with it.
        what: &'static str,
    },
    /// Entropy-coded weights that an operation is not for.
    #[error("{0}")]
    Weights(String),
    /// The GPU cannot run an operation.
    #[error("{operation}: compute capability {}.{} is too low", .capability.0, .capability.1)]
    Unsupported {
        /// What was asked for.
        operation: &'static str,
        /// Of the GPU.
        capability: (u32, u32),
    },
}

/// Not `From`, with which every `?` would need a type.
pub(crate) fn of_rans(error: crate::rans::RansError) -> Error {
    match error {
        crate::rans::RansError::Gpu(error) => error,
        other => Error::Weights(other.to_string()),
    }
}

/// A result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Names the call of the driver that failed.
pub(crate) trait Context<T> {
    /// `call` is the driver's name of the function.
    fn context(self, call: &'static str) -> Result<T>;
}

impl<T> Context<T> for std::result::Result<T, DriverError> {
    fn context(self, call: &'static str) -> Result<T> {
        self.map_err(|error| Error::Driver { call, name: format!("{:?}", error.0) })
    }
}

/// `13020` as `13.2`.
pub(crate) fn version(number: i32) -> String {
    format!("{}.{}", number / 1000, number % 1000 / 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_say_what_was_found_and_what_was_expected() {
        let cases = [
            (Error::DriverTooOld { found: 12_040, needed: 13_000 }, "CUDA 12.4, expected 13.0"),
            (Error::NoSuchGpu { ordinal: 3, count: 2 }, "no GPU 3: the NVIDIA driver sees 2"),
            (
                Error::NoKernels { capability: (7, 5), built: "90a" },
                "capability 7.5: this build has 90a",
            ),
        ];
        for (error, expected) in cases {
            assert!(error.to_string().contains(expected), "{error}");
        }
    }
}
