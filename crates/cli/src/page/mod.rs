//! Pages with pictures, one file a page.

pub(crate) mod compare;
pub(crate) mod inspect;
#[cfg(feature = "train")]
pub(crate) mod train;
