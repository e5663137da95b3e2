//! Trains small Llama-family decoders, if wanted with weights that are integers
//! of 8 bits in every forward pass and whose entropy is part of the loss.
//!
//! [`data`] reads texts and trains a tokenizer, [`model`] is the decoder,
//! [`quantize`] rounds its weights, [`train`](mod@train) is the loop, and
//! [`export`] writes a Hugging Face checkpoint. Everything that computes is
//! generic over the backend; [`Cpu`] is the one on the processor.
//!
//! The same options, texts and backend give the same losses, whether or not a
//! run was interrupted.

#![forbid(unsafe_code)]

pub mod data;
mod error;
pub mod export;
pub mod model;
mod parameters;
pub mod quantize;
mod random;
pub mod state;
pub mod train;

pub use burn_tensor::backend::AutodiffBackend;
pub use error::TrainError;
pub use parameters::{Stored, Values};

/// The backend on the processor.
pub type Cpu = burn_autodiff::Autodiff<burn_flex::Flex>;

/// The backend on an NVIDIA GPU.
#[cfg(feature = "cuda")]
pub type Gpu = burn_autodiff::Autodiff<burn_cuda::Cuda<f32, i32>>;
