//! CPU runtime for language models with losslessly compressed weights.
