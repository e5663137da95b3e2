//! CPU runtime for language models with losslessly compressed weights.
//!
//! A [`Model`] is loaded from a Hugging Face checkpoint directory, original or
//! packed, with its weights in a chosen layout; a [`Session`] runs it over a
//! sequence, [`generate`](generate::generate) continues a prompt,
//! [`compare`](compare::compare) puts two models side by side.
//!
//! Logits are the same to the bit for every layout, number of threads,
//! instruction set and way of cutting a prompt.

#![forbid(unsafe_code)]

mod attention;
pub mod calibrate;
pub mod chat;
pub mod compare;
pub mod config;
mod error;
pub mod generate;
mod math;
mod model;
pub mod rope;
pub mod sampler;
pub mod store;
mod tensors;
pub mod tiny;
pub mod tokenizer;
mod weights;

pub use error::RuntimeError;
pub use model::{DEFAULT_CHUNK, LoadProgress, Model, Session};
pub use store::StoreOptions;
