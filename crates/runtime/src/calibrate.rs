//! What the inputs of a model's matrices are like on a text.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use crate::error::RuntimeError;
use crate::model::{DEFAULT_CHUNK, Model, Session};
use crate::store::{MatrixId, Weights, matrices};

/// Tokens of a window the model is run over.
const WINDOW: usize = 512;

/// Runs a model over a text and returns the mean square of every input of
/// every matrix, by the name of its weight.
///
/// # Errors
///
/// [`RuntimeError::EmptyPrompt`] if the text has no tokens, or as [`Session::forward`].
///
/// # Cost
///
/// A run over the text, in windows of 512 tokens that know nothing of each other.
pub fn input_squares(
    model: Model,
    text: &str,
    mut progress: impl FnMut(usize, usize),
) -> Result<HashMap<String, Vec<f32>>, RuntimeError> {
    let ids = model.tokenizer().encode(text, true)?;
    if ids.is_empty() {
        return Err(RuntimeError::EmptyPrompt);
    }
    let matrices = matrices(model.config());
    let sums = matrices.iter().map(|matrix| Sum::new(matrix.cols)).collect::<Vec<_>>();
    let sums = Arc::new(Mutex::new(sums));
    let shared = Arc::clone(&sums);
    let model = model.wrap_weights(|inner| Box::new(Recorder { inner, sums: shared }));
    let window = WINDOW.min(model.config().max_position_embeddings);
    let mut session = Session::new(&model, window, DEFAULT_CHUNK)?;
    for (index, tokens) in ids.chunks(window).enumerate() {
        progress(index * window, ids.len());
        session.clear();
        for tokens in tokens.chunks(DEFAULT_CHUNK) {
            // All logits, so that the head sees all inputs.
            session.forward(tokens, tokens.len())?;
        }
    }
    drop(session);
    let sums = std::mem::take(&mut *sums.lock().unwrap_or_else(PoisonError::into_inner));
    let used = matrices.into_iter().zip(sums).filter(|(_, sum)| sum.n_tokens > 0);
    Ok(used.map(|(matrix, sum)| (matrix.name, sum.means())).collect())
}

/// Sums of squares over tokens.
#[derive(Debug)]
struct Sum {
    squares: Vec<f64>,
    n_tokens: usize,
}

impl Sum {
    fn new(cols: usize) -> Self {
        Self { squares: vec![0.0; cols], n_tokens: 0 }
    }

    fn means(&self) -> Vec<f32> {
        self.squares.iter().map(|sum| (sum / self.n_tokens as f64) as f32).collect()
    }
}

/// Weights that remember what they are multiplied with.
struct Recorder {
    inner: Box<dyn Weights>,
    sums: Arc<Mutex<Vec<Sum>>>,
}

impl fmt::Debug for Recorder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Recorder").field("inner", &self.inner).finish_non_exhaustive()
    }
}

impl Weights for Recorder {
    fn multiply(&self, matrix: MatrixId, x: &[f32], y: &mut [f32]) -> Result<(), RuntimeError> {
        self.inner.multiply(matrix, x, y)?;
        let mut sums = self.sums.lock().unwrap_or_else(PoisonError::into_inner);
        let sum = &mut sums[matrix.index()];
        for token in x.chunks_exact(sum.squares.len()) {
            for (sum, x) in sum.squares.iter_mut().zip(token) {
                *sum += f64::from(*x).powi(2);
            }
            sum.n_tokens += 1;
        }
        Ok(())
    }

    fn row(&self, matrix: MatrixId, row: usize, out: &mut [f32]) -> Result<(), RuntimeError> {
        self.inner.row(matrix, row, out)
    }

    fn resident_bytes(&self) -> usize {
        self.inner.resident_bytes()
    }
}
