//! GPU kernels of transom.
//!
//! Kernels are CUDA C++ (`kernels`), compiled by nvcc when this crate is built
//! and embedded. The driver's library is loaded when a [`Device`] is opened: a
//! program with this crate starts on a machine without a GPU, and
//! [`Device::open`] says what is missing.

pub mod bench;
mod buffer;
pub mod cublas;
mod device;
mod error;
pub mod fixed;
mod module;
pub mod prefill;
mod probe;
pub mod product;
pub mod rans;
mod stream;

pub use buffer::{DeviceBuffer, Element};
pub use device::{Device, DeviceInfo, count, list};
pub use error::{Error, Result};
pub use module::{ARCHITECTURES, Function, Launch};
pub use probe::Probe;
pub use stream::{Event, Graph, Stream};
