//! CPU runtime for language models with losslessly compressed weights.

#![forbid(unsafe_code)]

pub mod chat;
pub mod config;
mod error;
pub mod rope;
pub mod sampler;
pub mod tokenizer;

pub use error::RuntimeError;
