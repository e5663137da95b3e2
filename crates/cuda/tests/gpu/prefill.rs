//! Products of long prompts have the bits of the same library GEMM with dense weights.

use half::f16;
use transom::{Isa, Record, encode_record};
use transom_cuda::DeviceBuffer;
use transom_cuda::cublas::{Algorithm, Cublas, Half, Shape};
use transom_cuda::fixed::{DeviceMatrix, FixedMatrix, WeightFormat};
use transom_cuda::prefill::{Prefill, Weights};
use transom_cuda::rans::{Rans, RansMatrix};

use crate::product::{activations, one_scale, weights};
use crate::{Gpu, Random};

/// A layer in every way in which it can be multiplied.
struct Layer {
    dense: DeviceBuffer<u16>,
    fixed: DeviceMatrix,
    scales: Option<DeviceBuffer<f32>>,
    rans: Option<RansMatrix>,
}

impl Layer {
    fn new(gpu: &Gpu, format: WeightFormat, n: usize, k: usize, random: &mut Random) -> Self {
        let bytes = weights(format, n * k, 2, random);
        let encoded = FixedMatrix::encode(format, 32, n, k, &bytes, one_scale(format));
        let fixed = DeviceMatrix::new(&gpu.stream, &encoded).unwrap();
        let words = bytes.as_chunks::<2>().0.iter().map(|&pair| u16::from_le_bytes(pair));
        let (words, scales): (Vec<u16>, _) = match format.twin() {
            WeightFormat::DenseInt8 => {
                let scales: Vec<f32> =
                    (0..n).map(|_| 1e-3 + (random.bits() % 99) as f32 * 1e-4).collect();
                let value = |(i, &q): (usize, &u8)| f32::from(q as i8) * scales[i / k];
                let words = bytes.iter().enumerate().map(value);
                let words = words.map(|w| f16::from_f32(w).to_bits()).collect();
                (words, Some(gpu.stream.upload(&scales).unwrap()))
            }
            _ => (words.collect(), None),
        };
        let rans = (format.twin() == WeightFormat::DenseBf16).then(|| {
            let packed = encode_record(Isa::best(), format.dtype(), &[n, k], &bytes).unwrap();
            let record = Record::read(&packed, 0, packed.len() as u64).unwrap();
            Rans::new(&gpu.device).unwrap().load(&gpu.stream, &record, &packed).unwrap()
        });
        Self { dense: gpu.stream.upload(&words).unwrap(), fixed, scales, rans }
    }

    fn layouts(&self) -> Vec<Weights<'_>> {
        let fixed = Weights::Fixed(&self.fixed, self.scales.as_ref());
        [fixed].into_iter().chain(self.rans.as_ref().map(Weights::Rans)).collect()
    }
}

/// Sequences of layers, so that the ring is used again and again.
fn check(gpu: &Gpu, Shape { m, n, k }: Shape, n_layers: usize) {
    let mut random = Random::fresh();
    let cublas = Cublas::new(&gpu.stream).unwrap();
    let mut prefill = Prefill::new(&gpu.stream, n * k).unwrap();
    let n_sms = gpu.device.info().n_sms;
    for format in [WeightFormat::Bf16x3, WeightFormat::F16x3, WeightFormat::Int8x6] {
        let half = if format.twin() == WeightFormat::DenseBf16 { Half::Bf16 } else { Half::F16 };
        let layers: Vec<Layer> =
            (0..n_layers).map(|_| Layer::new(gpu, format, n, k, &mut random)).collect();
        let x = gpu.stream.upload(&activations(format, m * k, &mut random)).unwrap();
        let new_y = || DeviceBuffer::<u16>::filled(&gpu.device, m * n, 0xFF).unwrap();
        for product in [
            cublas.product(Shape { m, n, k }, half).unwrap(),
            cublas.product_on(n_sms - n_sms / 4, Shape { m, n, k }, half).unwrap(),
        ] {
            let algorithm: &Algorithm = &product.algorithms()[0];
            let expected: Vec<Vec<u16>> = layers
                .iter()
                .map(|layer| {
                    let mut y = new_y();
                    product.multiply(algorithm, &layer.dense, &x, &mut y).unwrap();
                    gpu.stream.download(&y).unwrap()
                })
                .collect();
            for layout in 0..layers[0].layouts().len() {
                let mut results: Vec<_> = layers.iter().map(|_| new_y()).collect();
                let mut forward = |results: &mut [DeviceBuffer<u16>]| {
                    prefill.begin(&gpu.stream)?;
                    for (layer, y) in layers.iter().zip(results) {
                        let weights = layer.layouts()[layout];
                        let n_sms = weights.decoding_sms(m, n_sms);
                        prefill.multiply((&product, algorithm), &weights, &x, y, n_sms)?;
                    }
                    Ok(())
                };
                let check = |results: &[DeviceBuffer<u16>], how: &str| {
                    for (i, (y, expected)) in results.iter().zip(&expected).enumerate() {
                        let found = gpu.stream.download(y).unwrap();
                        assert!(
                            found == *expected,
                            "{format:?}, layout {layout}, layer {i}, {how}"
                        );
                    }
                };
                forward(&mut results).unwrap();
                check(&results, "at once");
                // SAFETY: everything lives until the graph has been replayed below.
                let graph = unsafe { gpu.stream.capture(|_| forward(&mut results)) }.unwrap();
                for _ in 0..3 {
                    for y in &mut results {
                        gpu.stream.fill(y, 0xFF).unwrap();
                    }
                    graph.launch(&gpu.stream).unwrap();
                    check(&results, "replayed");
                }
            }
        }
    }
}

#[test]
fn prefill_of_small_layers() {
    let Some(gpu) = Gpu::open() else { return };
    check(&gpu, Shape { m: 72, n: 144, k: 272 }, 3);
}

#[test]
fn prefill_has_the_bits_of_the_dense_product() {
    let Some(gpu) = Gpu::open() else { return };
    check(&gpu, Shape { m: 512, n: 4096, k: 2048 }, 7);
}

#[test]
fn a_small_ring_refuses_large_matrices() {
    let Some(gpu) = Gpu::open() else { return };
    let shape = Shape { m: 80, n: 144, k: 272 };
    let layer = Layer::new(&gpu, WeightFormat::Bf16x3, 144, 272, &mut Random::fresh());
    let cublas = Cublas::new(&gpu.stream).unwrap();
    let product = cublas.product(shape, Half::Bf16).unwrap();
    let mut prefill = Prefill::new(&gpu.stream, 144 * 272 - 1).unwrap();
    let x = DeviceBuffer::new(&gpu.device, 80 * 272).unwrap();
    let mut y = DeviceBuffer::new(&gpu.device, 80 * 144).unwrap();
    prefill.begin(&gpu.stream).unwrap();
    let with = (&product, &product.algorithms()[0]);
    for weights in layer.layouts() {
        assert!(prefill.multiply(with, &weights, &x, &mut y, 2).is_err());
    }
}
