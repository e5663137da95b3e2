//! The loop.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::time::Instant;

use burn_tensor::Tensor;
use burn_tensor::backend::{AutodiffBackend, Backend};
use serde::{Deserialize, Serialize};

use crate::data::{Batch, Books, Tokenizer, random_starts};
use crate::error::{At, TrainError};
use crate::model::{LlamaConfig, Role, Tables, cross_entropy, forward};
use crate::parameters::{Parameters, Stored, Values};
use crate::quantize::{Granularity, entropy};
use crate::state::{State, floats, write_whole};

/// The tokenizer within the directory of a run.
pub const TOKENIZER_NAME: &str = "tokenizer.json";
/// The state within the directory of a run.
pub const STATE_NAME: &str = "state.safetensors";
/// The log within the directory of a run: one JSON object a line.
pub const LOG_NAME: &str = "log.jsonl";

/// How weights are rounded while training.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Quantization {
    /// What shares a scale.
    pub granularity: Granularity,
    /// Nats of loss for each bit a weight; 0 leaves the entropy alone.
    #[serde(default)]
    pub rate: f64,
}

impl Quantization {
    /// Whether scales are learned: only then can integers become fewer than 127 to either side.
    #[must_use]
    pub fn learns_scales(&self) -> bool {
        self.rate > 0.0
    }
}

/// What to train, and how. Read from JSON, fields that are missing have their defaults.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainOptions {
    /// The model.
    pub model: LlamaConfig,
    /// How to round weights; `None` leaves them.
    pub quantization: Option<Quantization>,
    /// Seed of everything random.
    pub seed: u64,
    /// Steps of the optimiser, all in all.
    pub steps: usize,
    /// Sequences of a step.
    pub batch_size: usize,
    /// Passes that a step is cut into; divides `batch_size`.
    pub passes: usize,
    /// Passes at a time, on a thread each.
    pub threads: usize,
    /// Tokens of a sequence.
    pub sequence_length: usize,
    /// Learning rate after the warm-up.
    pub learning_rate: f64,
    /// Learning rate at the end, as a share of it.
    pub final_share: f64,
    /// Steps in which the learning rate rises from 0.
    pub warmup: usize,
    /// Weight decay of matrices.
    pub weight_decay: f64,
    /// Decay of the two moments.
    pub betas: [f64; 2],
    /// Largest norm of the gradient.
    pub clip: f64,
    /// Steps from one line of the log to the next.
    pub log_every: usize,
    /// Steps from one validation and state file to the next.
    pub save_every: usize,
    /// Sequences to validate with at most.
    pub validation_sequences: usize,
}

impl Default for TrainOptions {
    fn default() -> Self {
        Self {
            model: LlamaConfig::default(),
            quantization: None,
            seed: 0,
            steps: 1000,
            batch_size: 16,
            passes: 4,
            threads: 1,
            sequence_length: 256,
            learning_rate: 2e-3,
            final_share: 0.1,
            warmup: 100,
            weight_decay: 0.1,
            betas: [0.9, 0.95],
            clip: 1.0,
            log_every: 10,
            save_every: 200,
            validation_sequences: 64,
        }
    }
}

impl TrainOptions {
    /// Checks that they make sense.
    ///
    /// # Errors
    ///
    /// [`TrainError::Field`] with the first field that is out of range.
    pub fn check(&self) -> Result<(), TrainError> {
        self.model.check()?;
        let wrong = |field, found: String, expected: &str| {
            Err(TrainError::Field { field, found, expected: expected.to_owned() })
        };
        let counts = [
            ("steps", self.steps),
            ("batch_size", self.batch_size),
            ("passes", self.passes),
            ("threads", self.threads),
            ("sequence_length", self.sequence_length),
            ("log_every", self.log_every),
            ("save_every", self.save_every),
            ("validation_sequences", self.validation_sequences),
        ];
        for (field, count) in counts {
            if count == 0 {
                return wrong(field, "0".to_owned(), "a positive number");
            }
        }
        if !self.batch_size.is_multiple_of(self.passes) {
            let expected = format!("a divisor of batch_size ({})", self.batch_size);
            return wrong("passes", self.passes.to_string(), &expected);
        }
        if self.sequence_length > self.model.max_position_embeddings {
            let expected =
                format!("at most max_position_embeddings ({})", self.model.max_position_embeddings);
            return wrong("sequence_length", self.sequence_length.to_string(), &expected);
        }
        let rate = self.quantization.map_or(0.0, |quantization| quantization.rate);
        let shares = [
            ("final_share", self.final_share, 1.0),
            ("weight_decay", self.weight_decay, f64::MAX),
            ("rate", rate, f64::MAX),
            ("betas", self.betas[0], 1.0 - f64::EPSILON),
            ("betas", self.betas[1], 1.0 - f64::EPSILON),
        ];
        for (field, number, largest) in shares {
            if !(0.0..=largest).contains(&number) {
                return wrong(field, number.to_string(), "a number from 0 on, shares below 1");
            }
        }
        for (field, number) in [("learning_rate", self.learning_rate), ("clip", self.clip)] {
            if !(number.is_finite() && number > 0.0) {
                return wrong(field, number.to_string(), "a positive number");
            }
        }
        Ok(())
    }

    /// Tokens that a step learns from.
    #[must_use]
    pub const fn tokens_per_step(&self) -> usize {
        self.batch_size * self.sequence_length
    }

    /// The learning rate of a step, counted from 0.
    #[must_use]
    pub fn learning_rate_at(&self, step: usize) -> f64 {
        if step < self.warmup {
            return self.learning_rate * (step + 1) as f64 / self.warmup as f64;
        }
        let length = self.steps.saturating_sub(self.warmup).max(1);
        let done = ((step - self.warmup) as f64 / length as f64).min(1.0);
        let cosine = 0.5 * (1.0 + (std::f64::consts::PI * done).cos());
        self.learning_rate * (self.final_share + (1.0 - self.final_share) * cosine)
    }
}

/// How much faster than weights the logarithms of scales are learned: they have far to go.
const STRETCH_SPEED: f64 = 10.0;

/// A line of the log.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct LogLine {
    /// Steps done.
    pub step: usize,
    /// Tokens seen.
    pub tokens: u64,
    /// Cross-entropy in nats, of the last step.
    pub loss: f64,
    /// Norm of the gradient before it was clipped.
    pub gradient_norm: f64,
    /// Learning rate of the step.
    pub learning_rate: f64,
    /// Tokens a second since the line before, validation not counted.
    pub tokens_per_second: f64,
    /// Entropy of the integers, if there are any and the step validated.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bits_per_weight: Option<f64>,
    /// On texts held out with the weights that a checkpoint would hold, if the step validated.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub validation_perplexity: Option<f64>,
}

/// The tokens of a run.
#[derive(Debug, Clone)]
pub struct Corpus {
    /// To learn from.
    pub training: Vec<u32>,
    /// To validate with; may be empty.
    pub validation: Vec<u32>,
}

impl Corpus {
    /// Tokenises books with the tokenizer in `directory`, which is trained and
    /// saved there if there is none.
    ///
    /// # Errors
    ///
    /// [`TrainError`] if the tokenizer cannot be trained, read or written.
    pub fn prepare(
        books: &Books,
        vocab_size: usize,
        directory: &Path,
    ) -> Result<(Self, Tokenizer), TrainError> {
        fs::create_dir_all(directory).at(directory)?;
        let path = directory.join(TOKENIZER_NAME);
        let tokenizer = if path.exists() {
            Tokenizer::parse(fs::read_to_string(&path).at(&path)?)?
        } else {
            let tokenizer = Tokenizer::train(&books.training, vocab_size)?;
            write_whole(&path, tokenizer.json().as_bytes())?;
            tokenizer
        };
        if tokenizer.n_tokens() > vocab_size {
            return Err(TrainError::Tokenizer(format!(
                "{} has {} tokens, the model {vocab_size}",
                path.display(),
                tokenizer.n_tokens()
            )));
        }
        let corpus = Self {
            training: tokenizer.encode(&books.training)?,
            validation: tokenizer.encode(&books.validation)?,
        };
        Ok((corpus, tokenizer))
    }
}

/// A run in progress.
#[derive(Debug)]
pub struct Trainer<B: AutodiffBackend> {
    options: TrainOptions,
    parameters: Parameters,
    device: B::Device,
    state: State<B::InnerBackend>,
}

/// What a step found, still on the device.
struct Step<B: Backend> {
    loss: Tensor<B, 1>,
    norm: Tensor<B, 1>,
}

/// Loss and gradients of a pass.
struct Pass<B: Backend> {
    loss: Tensor<B, 1>,
    gradients: Vec<Option<Tensor<B, 2>>>,
}

impl<B: AutodiffBackend> Trainer<B> {
    /// A run before its first step.
    ///
    /// # Errors
    ///
    /// [`TrainError::Field`] if the options make no sense.
    pub fn new(options: TrainOptions, device: B::Device) -> Result<Self, TrainError> {
        options.check()?;
        let parameters = Parameters::new(&options);
        let state = State::new(parameters.initial(&options, &device));
        Ok(Self { options, parameters, device, state })
    }

    /// Goes on from a state file of a run with these options on these texts.
    ///
    /// # Errors
    ///
    /// [`TrainError::State`] if it is not one.
    pub fn resume(
        options: TrainOptions,
        device: B::Device,
        corpus: &Corpus,
        path: &Path,
    ) -> Result<Self, TrainError> {
        options.check()?;
        let parameters = Parameters::new(&options);
        let run = run_key(&options, corpus);
        let state = State::load(path, &parameters.specs, &run, &device)?;
        Ok(Self { options, parameters, device, state })
    }

    /// Steps done.
    #[must_use]
    pub const fn step(&self) -> usize {
        self.state.step
    }

    /// The options.
    #[must_use]
    pub const fn options(&self) -> &TrainOptions {
        &self.options
    }

    /// The tensors of a checkpoint, as they are now.
    #[must_use]
    pub fn stored(&self) -> Vec<Stored<B::InnerBackend>> {
        self.parameters.stored(&self.state.parameters)
    }

    /// Trains to the end, or for `limit` steps if that is less, and calls
    /// `report` with each line of the log.
    ///
    /// `directory` receives `log.jsonl` and the state.
    ///
    /// # Errors
    ///
    /// [`TrainError::TooFewTokens`] if the training texts do not fill a
    /// sequence, [`TrainError::Diverged`], [`TrainError::Io`].
    pub fn run(
        &mut self,
        corpus: &Corpus,
        directory: &Path,
        limit: Option<usize>,
        report: &mut dyn FnMut(&LogLine),
    ) -> Result<(), TrainError> {
        let expected = self.options.sequence_length + 1;
        if corpus.training.len() < expected {
            return Err(TrainError::TooFewTokens {
                what: "the training texts",
                found: corpus.training.len(),
                expected,
            });
        }
        fs::create_dir_all(directory).at(directory)?;
        let log_path = directory.join(LOG_NAME);
        forget_after(&log_path, self.state.step)?;
        let mut log = OpenOptions::new().create(true).append(true).open(&log_path).at(&log_path)?;
        let run = run_key(&self.options, corpus);
        let tables = Tables::new(&self.options.model, self.options.sequence_length, &self.device);
        let last = limit.map_or(self.options.steps, |limit| self.options.steps.min(limit));
        let per_step = self.options.tokens_per_step();
        let (mut started, mut since) = (Instant::now(), self.state.step);
        while self.state.step < last {
            let learning_rate = self.options.learning_rate_at(self.state.step);
            let found = self.advance(&corpus.training, &tables, learning_rate);
            let step = self.state.step;
            let saves = step.is_multiple_of(self.options.save_every) || step == last;
            if !(saves || step.is_multiple_of(self.options.log_every)) {
                continue;
            }
            let (loss, gradient_norm) = (scalar(found.loss), scalar(found.norm));
            // The norm is that of the update that the state has seen and the loss has not.
            for found in [loss, gradient_norm] {
                if !found.is_finite() {
                    return Err(TrainError::Diverged { step, found });
                }
            }
            let seconds = started.elapsed().as_secs_f64().max(1e-9);
            let line = LogLine {
                step,
                tokens: (step * per_step) as u64,
                loss,
                gradient_norm,
                learning_rate,
                tokens_per_second: ((step - since) * per_step) as f64 / seconds,
                bits_per_weight: saves.then(|| self.bits_per_weight()).flatten(),
                validation_perplexity: saves.then(|| self.perplexity(&corpus.validation)).flatten(),
            };
            // Before the state: lines that it does not know of are dropped, lines that are
            // missing would stay so.
            let text = serde_json::to_string(&line).expect("numbers and names");
            writeln!(log, "{text}").at(&log_path)?;
            if saves {
                self.state.save(&directory.join(STATE_NAME), &self.parameters.specs, &run)?;
            }
            report(&line);
            (started, since) = (Instant::now(), step);
        }
        Ok(())
    }

    /// Perplexity of the weights that a checkpoint would hold, on sequences spread evenly over
    /// `stream`; `None` if it does not fill one.
    #[must_use]
    pub fn perplexity(&self, stream: &[u32]) -> Option<f64> {
        let length = self.options.sequence_length;
        let n_fit = stream.len().saturating_sub(1) / length;
        let n_sequences = n_fit.min(self.options.validation_sequences);
        let starts: Vec<usize> =
            (0..n_sequences).map(|i| i * n_fit / n_sequences * length).collect();
        let weights: Vec<_> = self.stored().iter().map(Stored::weights).collect();
        let tables = Tables::new(&self.options.model, length, &self.device);
        let batches: Vec<&[usize]> =
            starts.chunks(self.options.batch_size / self.options.passes).collect();
        let sums = in_parallel(batches.len(), self.options.threads, |index| {
            let batch = Batch::new(stream, batches[index], length, &self.device);
            let logits = forward(&self.options.model, &weights, &tables, batch.inputs);
            scalar(cross_entropy(logits, batch.targets)) * batches[index].len() as f64
        });
        (n_sequences > 0).then(|| (sums.iter().sum::<f64>() / n_sequences as f64).exp())
    }

    /// Entropy of all integers, those of a matrix together; `None` if there are none.
    fn bits_per_weight(&self) -> Option<f64> {
        let (mut bits, mut n_weights) = (0.0, 0);
        for stored in self.stored() {
            let Values::Int8 { integers, .. } = stored.values else { continue };
            let n = stored.spec.rows * stored.spec.cols;
            bits += entropy(integers) * n as f64;
            n_weights += n;
        }
        (n_weights > 0).then(|| bits / n_weights as f64)
    }

    /// One step of the optimiser.
    fn advance(
        &mut self,
        stream: &[u32],
        tables: &Tables<B::InnerBackend>,
        learning_rate: f64,
    ) -> Step<B::InnerBackend> {
        let (n_passes, threads) = (self.options.passes, self.options.threads);
        let passes = in_parallel(n_passes, threads, |index| self.pass(index, stream, tables));
        // In the order of the passes, whichever was ready first.
        let sum = passes.into_iter().reduce(|mut sum, pass| {
            sum.loss = sum.loss + pass.loss;
            for (sum, gradient) in sum.gradients.iter_mut().zip(pass.gradients) {
                *sum = match (sum.take(), gradient) {
                    (Some(a), Some(b)) => Some(a + b),
                    (a, b) => a.or(b),
                };
            }
            sum
        });
        let sum = sum.expect("checked: a pass or more");
        let norm = self.update(&sum.gradients, learning_rate);
        self.state.step += 1;
        Step { loss: sum.loss, norm }
    }

    /// Forward and backward of a share of a step's sequences.
    fn pass(
        &self,
        index: usize,
        stream: &[u32],
        tables: &Tables<B::InnerBackend>,
    ) -> Pass<B::InnerBackend> {
        let options = &self.options;
        let (length, n_passes) = (options.sequence_length, options.passes);
        let number = (self.state.step * n_passes + index) as u64;
        let n_sequences = options.batch_size / n_passes;
        let starts = random_starts(options.seed, number, n_sequences, stream.len(), length);
        let batch: Batch<B> = Batch::new(stream, &starts, length, &self.device);
        let leaves: Vec<Tensor<B, 2>> = (self.state.parameters.iter())
            .map(|parameter| Tensor::from_inner(parameter.clone()).require_grad())
            .collect();
        let weights = self.parameters.weights(&leaves);
        let logits = forward(&options.model, &weights, &tables.to_autodiff(), batch.inputs);
        let mut total = cross_entropy(logits, batch.targets).div_scalar(n_passes as f64);
        let loss = total.clone().inner();
        // The weights are the same for all passes: one of them has their entropy.
        if index == 0
            && let Some(rate) = self.parameters.rate(&leaves)
        {
            total = total + rate;
        }
        let mut gradients = total.backward();
        let gradients = leaves.iter().map(|leaf| leaf.grad_remove(&mut gradients)).collect();
        Pass { loss, gradients }
    }

    /// `AdamW`, as Loshchilov and Hutter (arXiv 1711.05101), algorithm 2; returns the norm of
    /// the gradient.
    fn update(
        &mut self,
        gradients: &[Option<Tensor<B::InnerBackend, 2>>],
        learning_rate: f64,
    ) -> Tensor<B::InnerBackend, 1> {
        let options = &self.options;
        let norm = (gradients.iter().flatten())
            .map(|gradient| (gradient.clone() * gradient.clone()).sum())
            .reduce(|sum, square| sum + square)
            .unwrap_or_else(|| Tensor::zeros([1], &self.device))
            .sqrt();
        let clip = norm.clone().add_scalar(1e-6).recip().mul_scalar(options.clip).clamp_max(1.0);
        let clip: Tensor<B::InnerBackend, 2> = clip.reshape([1, 1]);
        let [beta1, beta2] = options.betas;
        let n_steps = (self.state.step + 1) as i32;
        let (unbias1, unbias2) = (1.0 - beta1.powi(n_steps), 1.0 - beta2.powi(n_steps));
        let state = &mut self.state;
        for (index, gradient) in gradients.iter().enumerate() {
            let Some(gradient) = gradient else { continue };
            let gradient = gradient.clone() * clip.clone();
            let first = state.first[index].clone().mul_scalar(beta1)
                + gradient.clone().mul_scalar(1.0 - beta1);
            let second = state.second[index].clone().mul_scalar(beta2)
                + (gradient.clone() * gradient).mul_scalar(1.0 - beta2);
            let direction = first.clone().div_scalar(unbias1)
                / second.clone().div_scalar(unbias2).sqrt().add_scalar(1e-8);
            let (speed, decay) = match self.parameters.specs[index].role {
                Role::Norm => (1.0, 0.0),
                Role::Stretch => (STRETCH_SPEED, 0.0),
                _ => (1.0, options.weight_decay),
            };
            let learning_rate = learning_rate * speed;
            let parameter = state.parameters[index].clone().mul_scalar(1.0 - learning_rate * decay);
            state.parameters[index] = parameter - direction.mul_scalar(learning_rate);
            state.first[index] = first;
            state.second[index] = second;
        }
        norm
    }
}

fn scalar<B: Backend>(tensor: Tensor<B, 1>) -> f64 {
    f64::from(floats(tensor)[0])
}

/// What of options and texts decides the course of a run, as text.
fn run_key(options: &TrainOptions, corpus: &Corpus) -> String {
    let plain = TrainOptions {
        log_every: 1,
        save_every: 1,
        validation_sequences: 1,
        threads: 1,
        ..options.clone()
    };
    let options = serde_json::to_string(&plain).expect("numbers and names");
    let digest = blake3::hash(bytemuck::cast_slice(&corpus.training));
    format!("{options} {digest}")
}

/// `work(0)`, `work(1)`, ...: so many at a time, each on a thread of its own, where tensors are
/// computed on that thread alone. The results are those of one at a time.
fn in_parallel<T: Send>(n: usize, threads: usize, work: impl Fn(usize) -> T + Sync) -> Vec<T> {
    if threads == 1 {
        return (0..n).map(work).collect();
    }
    let share = |thread: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build();
        let own = || (thread..n).step_by(threads).map(&work).collect::<Vec<T>>();
        // Without threads of its own, the work is done all the same.
        pool.map_or_else(|_| own(), |pool| pool.install(own))
    };
    let mut shares: Vec<_> = std::thread::scope(|scope| {
        let share = &share;
        let handles: Vec<_> =
            (0..threads.min(n)).map(|thread| scope.spawn(move || share(thread))).collect();
        let join = |handle: std::thread::ScopedJoinHandle<'_, Vec<T>>| {
            handle.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)).into_iter()
        };
        handles.into_iter().map(join).collect()
    });
    let width = shares.len();
    (0..n).map(|index| shares[index % width].next().expect("one for each index")).collect()
}

/// The log of a run in `directory`.
///
/// # Errors
///
/// [`TrainError::Io`], or [`TrainError::State`] if a line is none of a log.
pub fn read_log(directory: &Path) -> Result<Vec<LogLine>, TrainError> {
    let path = directory.join(LOG_NAME);
    let text = fs::read_to_string(&path).at(&path)?;
    let wrong = |error| TrainError::State { path: path.clone(), reason: format!("{error}") };
    text.lines().map(|line| serde_json::from_str(line).map_err(wrong)).collect()
}

/// Drops the lines of steps that the state does not know of.
fn forget_after(log: &Path, step: usize) -> Result<(), TrainError> {
    if !log.exists() {
        return Ok(());
    }
    let text = fs::read_to_string(log).at(log)?;
    let known =
        |line: &&str| serde_json::from_str::<LogLine>(line).is_ok_and(|line| line.step <= step);
    let kept: String = text.lines().filter(known).flat_map(|line| [line, "\n"]).collect();
    if kept != text { write_whole(log, kept.as_bytes()) } else { Ok(()) }
}
