//! The baseline multiplies what it should.

use transom_cuda::DeviceBuffer;
use transom_cuda::cublas::{Cublas, Half, Shape};

use crate::{Gpu, Random};

type Narrow = fn(f32) -> u16;
type Widen = fn(u16) -> f64;

#[test]
fn every_algorithm_gives_the_product() {
    let Some(gpu) = Gpu::open() else { return };
    let mut random = Random::fresh();
    let shape = Shape { m: 3, n: 176, k: 272 };
    let Shape { m, n, k } = shape;
    let cublas = Cublas::new(&gpu.stream).unwrap();
    for half in [Half::Bf16, Half::F16] {
        let (bits, value): (Narrow, Widen) = match half {
            Half::Bf16 => {
                (|v| half::bf16::from_f32(v).to_bits(), |b| half::bf16::from_bits(b).to_f64())
            }
            Half::F16 => {
                (|v| half::f16::from_f32(v).to_bits(), |b| half::f16::from_bits(b).to_f64())
            }
        };
        let mut values = |n: usize| -> Vec<u16> {
            (0..n).map(|_| bits((random.bits() >> 40) as f32 / (1 << 24) as f32 - 0.5)).collect()
        };
        let (w, x) = (values(n * k), values(m * k));
        let dot = |row: usize, token: usize| -> f64 {
            (0..k).map(|i| value(w[row * k + i]) * value(x[token * k + i])).sum()
        };
        let weights = gpu.stream.upload(&w).unwrap();
        let activations = gpu.stream.upload(&x).unwrap();
        let product = cublas.product(shape, half).unwrap();
        assert!(product.algorithms().len() > 1, "no heuristics");
        for algorithm in product.algorithms() {
            let y = DeviceBuffer::<u16>::filled(&gpu.device, m * n, 0xFF).unwrap();
            // SAFETY: the buffers have the sizes and live until the download below.
            unsafe {
                product.launch(algorithm, weights.address(), activations.address(), y.address())
            }
            .unwrap();
            let y = gpu.stream.download(&y).unwrap();
            let (mut error, mut norm) = (0.0, 0.0);
            for (i, &found) in y.iter().enumerate() {
                let expected = dot(i % n, i / n);
                error += (value(found) - expected).powi(2);
                norm += expected * expected;
            }
            let error = (error / norm).sqrt();
            // NaN, of an element not written, is no success.
            assert!(error < 5e-3, "{}: relative error {error}", algorithm.name());
        }
    }
}
