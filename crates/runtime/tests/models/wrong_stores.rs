//! Ways in which weights loaded during generation have gone wrong, each built
//! on purpose, to see that comparison and poison catch them.
//!
//! `docs/experiments/dynamic-loading.md` tells the story. Every store here
//! holds weights that are right to the bit, and makes one mistake in using
//! them; the type system of the real store does not let any of them be written.

use std::path::Path;

use transom::Isa;
use transom::checkpoint::{Checkpoint, TensorKind};
use transom::layout::{Layout, Matrix, WeightType};
use transom_runtime::config::Config;
use transom_runtime::store::{MatrixId, MatrixInfo, Poison, Weights, matrices};
use transom_runtime::tiny::SyntheticCheckpoint;
use transom_runtime::{Model, RuntimeError, Session, StoreOptions};

use crate::{bits, greedy, load, packed, shared, written};

const PROMPT: [u32; 3] = [7, 100, 41];
const N_TOKENS: usize = 60;

/// One mistake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mistake {
    /// None: the same code without a mistake gives the right tokens.
    None,
    /// A product reads through a view of a buffer that has been given back and
    /// filled with the next matrix of the same shape.
    ViewOfReusedBuffer,
    /// The copy of the next matrix is not ordered after the product that reads
    /// the buffer: it arrives half way through the rows.
    UnorderedCopy,
    /// All matrices of a shape share the buffer of their scale.
    AliasedScale,
    /// Activations go through another type on their way into the product.
    DtypePromotion,
}

/// Weights that go through one buffer for each shape.
#[derive(Debug)]
struct WrongStore {
    mistake: Mistake,
    poison: Poison,
    checkpoint: Checkpoint,
    matrices: Vec<MatrixInfo>,
}

/// What one buffer holds.
#[derive(Debug)]
struct Buffer {
    weights: Matrix,
    /// Largest magnitude of the weights, as quantised ones have it.
    scale: f32,
}

impl WrongStore {
    fn new(path: &Path, mistake: Mistake, poison: Poison) -> Self {
        let checkpoint = Checkpoint::open(path).unwrap();
        let config = checkpoint.file_bytes("config.json").unwrap().unwrap();
        let config = Config::parse(&config, None).unwrap();
        Self { mistake, poison, checkpoint, matrices: matrices(&config) }
    }

    fn shape(&self, index: usize) -> (usize, usize) {
        (self.matrices[index].rows, self.matrices[index].cols)
    }

    /// The next matrix of the same shape.
    fn next(&self, index: usize) -> usize {
        let after = (index + 1..self.matrices.len()).chain(0..=index);
        after.into_iter().find(|&other| self.shape(other) == self.shape(index)).unwrap()
    }

    fn load(&self, index: usize) -> Matrix {
        let MatrixInfo { name, rows, cols } = &self.matrices[index];
        let tensor = self.checkpoint.tensor(name).unwrap().unwrap();
        let (shape, weight, isa) = ([*rows, *cols], WeightType::Bf16, Isa::best());
        match &tensor.kind {
            TensorKind::Dense => {
                let start = tensor.start();
                Matrix::from_dense(tensor.source(), start, shape, weight, Layout::Dense, isa)
                    .unwrap()
            }
            TensorKind::Packed(record) => {
                Matrix::from_record(record, tensor.source(), shape, weight, Layout::Fixed, isa)
                    .unwrap()
            }
        }
    }

    fn scale(weights: &Matrix) -> f32 {
        let mut row = vec![0.0; weights.cols()];
        let mut scale = 0f32;
        for index in 0..weights.rows() {
            weights.row_with(Isa::best(), index, &mut row).unwrap();
            scale = row.iter().fold(scale, |scale, w| scale.max(w.abs()));
        }
        scale
    }

    /// A buffer into which a matrix has been copied, completely.
    fn filled(&self, index: usize) -> Buffer {
        let weights = self.load(index);
        let scale = Self::scale(&weights);
        Buffer { weights, scale }
    }

    /// Begins to copy the next matrix of the same shape into a buffer. With
    /// poison, what the buffer held is made useless first, and whoever reads
    /// before the copy has arrived reads that.
    fn reuse(&self, buffer: &mut Buffer, index: usize) {
        if self.poison == Poison::Off {
            *buffer = self.filled(self.next(index));
            return;
        }
        buffer.weights.poison();
        buffer.scale = f32::NAN;
    }

    fn product(
        &self,
        index: usize,
        weights: &Matrix,
        x: &[f32],
        y: &mut [f32],
    ) -> Result<(), RuntimeError> {
        weights.multiply_with(Isa::best(), x, y).map_err(|error| RuntimeError::Tensor {
            path: self.checkpoint.root().to_owned(),
            tensor: self.matrices[index].name.clone(),
            reason: error.to_string(),
        })
    }
}

impl Weights for WrongStore {
    fn multiply(&self, matrix: MatrixId, x: &[f32], y: &mut [f32]) -> Result<(), RuntimeError> {
        let index = matrix.index();
        let mut buffer = self.filled(index);
        match self.mistake {
            Mistake::None => self.product(index, &buffer.weights, x, y),
            Mistake::ViewOfReusedBuffer => {
                self.reuse(&mut buffer, index);
                self.product(index, &buffer.weights, x, y)
            }
            Mistake::UnorderedCopy => {
                self.product(index, &buffer.weights, x, y)?;
                self.reuse(&mut buffer, index);
                let mut late = vec![0.0; y.len()];
                self.product(index, &buffer.weights, x, &mut late)?;
                let rows = self.shape(index).0;
                for (y, late) in y.chunks_mut(rows).zip(late.chunks(rows)) {
                    y[rows / 2..].copy_from_slice(&late[rows / 2..]);
                }
                Ok(())
            }
            Mistake::AliasedScale => {
                let scale = buffer.scale;
                self.product(index, &buffer.weights, x, y)?;
                self.reuse(&mut buffer, index);
                y.iter_mut().for_each(|y| *y *= buffer.scale / scale);
                Ok(())
            }
            Mistake::DtypePromotion => {
                let x: Vec<f32> = x.iter().map(|&x| half::bf16::from_f32(x).to_f32()).collect();
                self.product(index, &buffer.weights, &x, y)
            }
        }
    }

    fn row(&self, matrix: MatrixId, row: usize, out: &mut [f32]) -> Result<(), RuntimeError> {
        self.load(matrix.index()).row_with(Isa::best(), row, out).unwrap();
        Ok(())
    }

    fn resident_bytes(&self) -> usize {
        0
    }
}

/// What came of a mistake.
#[derive(Debug, PartialEq, Eq)]
struct Outcome {
    text: String,
    /// First token that is not that of the static run.
    first_divergence: Option<usize>,
    /// First token after which a logit is not that of the static run.
    first_other_logit: Option<usize>,
}

fn run(path: &Path, prompt: &[u32], mistake: Mistake) -> Outcome {
    let expected = greedy(&load(path, Layout::Dense), prompt, N_TOKENS, true);
    let store = WrongStore::new(path, mistake, Poison::Off);
    let model = Model::with_weights(path, Box::new(store)).unwrap();
    let found = greedy(&model, prompt, N_TOKENS, true);
    let vocabulary = model.config().vocab_size;
    let rows = |logits: Option<Vec<f32>>| bits(&logits.unwrap());
    let (expected_logits, found_logits) = (rows(expected.logits), rows(found.logits));
    let pairs = expected_logits.chunks(vocabulary).zip(found_logits.chunks(vocabulary));
    Outcome {
        text: model.tokenizer().decode_continuation(prompt, &found.ids).unwrap(),
        first_divergence: expected.ids.iter().zip(&found.ids).position(|(a, b)| a != b),
        first_other_logit: pairs.into_iter().position(|(a, b)| a != b),
    }
}

/// What poison makes of a mistake, at the first token.
fn poisoned(path: &Path, mistake: Mistake) -> Result<(), RuntimeError> {
    let store = WrongStore::new(path, mistake, Poison::On);
    let model = Model::with_weights(path, Box::new(store)).unwrap();
    let mut session = Session::new(&model, 10, 16).unwrap();
    session.forward(&PROMPT, 1).map(|_| ())
}

/// Mistakes by which weights are read after their buffer has been given back.
const LATE_READS: [Mistake; 3] =
    [Mistake::ViewOfReusedBuffer, Mistake::UnorderedCopy, Mistake::AliasedScale];

fn check_every_mistake(path: &Path, prompt: &[u32]) {
    let right = run(path, prompt, Mistake::None);
    eprintln!("{right:?}");
    assert_eq!((right.first_divergence, right.first_other_logit), (None, None));
    assert!(poisoned(path, Mistake::None).is_ok());
    for mistake in LATE_READS {
        let outcome = run(path, prompt, mistake);
        eprintln!("{mistake:?}: {outcome:?}");
        // Plausible numbers: nothing but the comparison shows it.
        assert_eq!(outcome.first_other_logit, Some(0), "{mistake:?}");
        assert!(outcome.first_divergence.is_some(), "{mistake:?}");
        let error = poisoned(path, mistake).unwrap_err();
        assert!(matches!(error, RuntimeError::NotFinite { .. }), "{mistake:?}: {error}");
    }
    // Nothing is read late here, so only the comparison can show it, and the
    // logits do before the text does.
    let outcome = run(path, prompt, Mistake::DtypePromotion);
    eprintln!("{:?}: {outcome:?}", Mistake::DtypePromotion);
    assert_eq!(outcome.first_other_logit, Some(0));
    assert!(poisoned(path, Mistake::DtypePromotion).is_ok());
}

#[test]
fn every_mistake_is_caught_and_the_same_code_without_one_passes() {
    let original = written(&SyntheticCheckpoint::tiny());
    let target = packed(original.path());
    for path in [original.path(), &target.path().join("packed")] {
        check_every_mistake(path, &PROMPT);
    }
    if let Some(path) = shared("models/stories260k") {
        check_every_mistake(&path, &[1, 403, 407]);
    }
}

/// What the wrong ones are to be compared with: the real store, in the least
/// memory there is, with poison.
#[test]
fn the_real_store_passes_the_same_comparison() {
    let original = written(&SyntheticCheckpoint::tiny());
    let expected = greedy(&load(original.path(), Layout::Dense), &PROMPT, N_TOKENS, true);
    for layout in Layout::ALL {
        let least = match Model::load(
            original.path(),
            StoreOptions { memory: Some(0), ..StoreOptions::new(layout) },
            &mut |_| (),
        ) {
            Err(RuntimeError::Memory { expected, .. }) => expected,
            other => panic!("{other:?}"),
        };
        let options =
            StoreOptions { memory: Some(least), poison: Poison::On, ..StoreOptions::new(layout) };
        let model = Model::load(original.path(), options, &mut |_| ()).unwrap();
        let found = greedy(&model, &PROMPT, N_TOKENS, true);
        assert_eq!(found.ids, expected.ids);
        let logits = |generation: &Option<Vec<f32>>| bits(generation.as_ref().unwrap());
        assert!(logits(&found.logits) == logits(&expected.logits));
    }
}
