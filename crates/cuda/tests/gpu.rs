//! Tests that need a GPU. Without one each says SKIPPED, and passes; with
//! TRANSOM_GPU=1 in the environment they fail instead. `cargo xtask gpu-bundle`
//! carries this program to a machine with a GPU.

#![allow(clippy::print_stdout)]

#[path = "gpu/cublas.rs"]
mod cublas;
#[path = "gpu/decode.rs"]
mod decode;
#[path = "gpu/exact.rs"]
mod exact;
#[path = "gpu/prefill.rs"]
mod prefill;
#[path = "gpu/probe.rs"]
mod probe;
#[path = "gpu/product.rs"]
mod product;
#[path = "gpu/rans.rs"]
mod rans;

use std::io::Write as _;

use transom_cuda::{Device, Stream};

/// GPU 0 with a stream, or `None` after saying that the test is skipped. Every
/// test starts with
///
/// ```ignore
/// let Some(gpu) = Gpu::open() else { return };
/// ```
pub struct Gpu {
    /// Non-default.
    pub stream: Stream,
    /// GPU 0.
    pub device: Device,
}

impl Gpu {
    /// See [`Gpu`].
    pub fn open() -> Option<Self> {
        let device = match Device::open(0) {
            Ok(device) => device,
            Err(error) if std::env::var_os("TRANSOM_GPU").is_some() => {
                panic!("TRANSOM_GPU is set, and there is no GPU to use: {error}")
            }
            Err(error) => {
                // Past the harness, which hides what passing tests print; the
                // bundle's script looks for it.
                let test = std::thread::current().name().unwrap_or("test").to_owned();
                let _ = writeln!(std::io::stderr(), "SKIPPED {test}: {error}");
                return None;
            }
        };
        let stream = device.stream().expect("a stream");
        Some(Self { stream, device })
    }
}

/// Random numbers; the seed is fresh in every run and printed, so that a
/// failure can be repeated with TRANSOM_SEED.
pub struct Random(u64);

impl Random {
    /// Seeded from TRANSOM_SEED, or from the clock.
    pub fn fresh() -> Self {
        let given = std::env::var("TRANSOM_SEED").ok().and_then(|text| text.parse().ok());
        let seed = given.unwrap_or_else(|| {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
            now.expect("the clock is past 1970").as_nanos() as u64
        });
        println!("TRANSOM_SEED={seed}");
        Self(seed)
    }

    /// 64 random bits, by the generator of Steele, Lea and Flood (2014).
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// `n` random words.
    pub fn words(&mut self, n: usize) -> Vec<u32> {
        (0..n).map(|_| self.bits() as u32).collect()
    }
}
