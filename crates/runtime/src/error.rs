//! What can go wrong when a model is loaded or run.

use std::io;
use std::path::PathBuf;

use transom::checkpoint::CheckpointError;

/// A model cannot be loaded or run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RuntimeError {
    // === config.json ========================================================
    /// A file the model needs is not in the checkpoint.
    #[error("the checkpoint has no {file}")]
    MissingFile {
        /// Its name.
        file: &'static str,
    },
    /// A side file is not JSON.
    #[error("{file}: {source}")]
    Json {
        /// The file.
        file: &'static str,
        /// What the parser says.
        source: serde_json::Error,
    },
    /// A field is missing or has a value no model can have.
    #[error("{file}: `{field}` is {found}, expected {expected}")]
    Field {
        /// The file.
        file: &'static str,
        /// The field, with dots for nesting.
        field: String,
        /// Its value, or `missing`.
        found: String,
        /// What a model has there.
        expected: String,
    },
    /// A field has a value that other programs know and this runtime does not.
    #[error("model not supported: `{field}` in config.json is {found}, supported is {supported}")]
    Unsupported {
        /// The field, with dots for nesting.
        field: String,
        /// Its value.
        found: String,
        /// The values this runtime supports.
        supported: String,
    },

    // === Tensors ============================================================
    /// The checkpoint lacks a tensor that the configuration calls for.
    #[error("{}: tensor `{tensor}` is missing", path.display())]
    MissingTensor {
        /// The checkpoint.
        path: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// A tensor has another shape than the configuration gives it.
    #[error("{}: tensor `{tensor}` has shape {found:?}, config.json gives {expected:?}", path.display())]
    TensorShape {
        /// The file or checkpoint the tensor is in.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Shape in the file.
        found: Vec<u64>,
        /// Shape by the configuration.
        expected: Vec<u64>,
    },
    /// A tensor has an element type the runtime does not compute with.
    #[error("{}: tensor `{tensor}` is {found}, expected BF16, F16, F32 or, if it is a matrix, I8", path.display())]
    TensorDtype {
        /// The file or checkpoint the tensor is in.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its type.
        found: String,
    },
    /// A matrix of integers has no scale, or one that cannot be.
    #[error("{}: tensor `{tensor}`: {reason}", path.display())]
    Scale {
        /// The file or checkpoint the tensor is in.
        path: PathBuf,
        /// The scale.
        tensor: String,
        /// What is wrong.
        reason: String,
    },
    /// A tensor cannot be read.
    #[error("{}: tensor `{tensor}`: {reason}", path.display())]
    Tensor {
        /// The file or checkpoint the tensor is in.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// What is wrong.
        reason: String,
    },
    /// The checkpoint cannot be opened or read.
    #[error("{0}")]
    Checkpoint(#[from] CheckpointError),

    /// The weights do not fit the memory they may take.
    #[error("weights may take {found} bytes of memory, this model needs at least {expected}")]
    Memory {
        /// The budget.
        found: u64,
        /// The least that would do.
        expected: u64,
    },

    // === Text ===============================================================
    /// `tokenizer.json` is not valid, or a text cannot be tokenised.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// A chat was asked for and the model has no template.
    #[error(
        "the model has no chat template: neither `chat_template` in tokenizer_config.json nor chat_template.jinja"
    )]
    NoChatTemplate,
    /// The chat template does not parse or does not render.
    #[error("chat template: {0}")]
    ChatTemplate(String),

    // === Running ============================================================
    /// Nothing to continue.
    #[error("the prompt has no tokens")]
    EmptyPrompt,
    /// A token id outside the vocabulary.
    #[error("token id {found}, expected below {vocabulary}")]
    TokenId {
        /// The id.
        found: u32,
        /// Size of the vocabulary.
        vocabulary: usize,
    },
    /// More tokens than the context holds.
    #[error("{found} tokens, the context holds {capacity}")]
    ContextLength {
        /// Tokens asked for.
        found: usize,
        /// Positions there are.
        capacity: usize,
    },
    /// A logit is NaN or infinite, so no token can be chosen.
    #[error(
        "the logit of token {token} at position {position} is {found}, expected a finite number"
    )]
    NotFinite {
        /// Position of the token the logits follow.
        position: usize,
        /// The token with that logit.
        token: usize,
        /// The logit.
        found: f32,
    },
    /// A sampling parameter is out of range.
    #[error("{name} is {found}, expected {expected}")]
    Sampling {
        /// The parameter.
        name: &'static str,
        /// Its value.
        found: f32,
        /// The legal range.
        expected: &'static str,
    },
    /// Two models that are to be compared do not speak of the same tokens.
    #[error("vocabulary of {other} tokens, the base model has {base}")]
    Vocabulary {
        /// Size in the base model.
        base: usize,
        /// Size in the other one.
        other: usize,
    },

    // === Wrapped ============================================================
    /// Reading or writing failed.
    #[error("{0}")]
    Io(#[from] io::Error),
}
