//! A decoder with its weights, and one run of it over a sequence.

use std::path::Path;
use std::sync::Arc;

use rayon::prelude::*;
use transom::Isa;
use transom::checkpoint::Checkpoint;
use transom::layout::Layout;

use crate::attention::LayerCache;
use crate::chat::ChatTemplate;
use crate::config::Config;
use crate::error::RuntimeError;
use crate::math::{add, rms_norm, rms_norm_in_place, swiglu};
use crate::rope::{rotate, rotation};
use crate::store::{self, Ids, MatrixId, Plan, Residency, StoreOptions, WeightStore, Weights};
use crate::tensors;
use crate::tokenizer::Tokenizer;
use crate::weights::Loader;

/// How far loading has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadProgress {
    /// Tensors loaded.
    pub n_tensors: usize,
    /// Tensors there are to load.
    pub n_tensors_total: usize,
    /// Bytes the loaded ones take in memory.
    pub weights_bytes: usize,
}

/// A matrix and what is added to its product.
#[derive(Debug)]
struct Linear {
    weight: MatrixId,
    bias: Option<Vec<f32>>,
}

#[derive(Debug)]
struct Layer {
    input_norm: Vec<f32>,
    post_attention_norm: Vec<f32>,
    /// Norms of a head of q and of k.
    qk_norm: Option<(Vec<f32>, Vec<f32>)>,
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    gate: Linear,
    up: Linear,
    down: Linear,
}

/// A model that is ready to run. Logits depend on weights and tokens only: not on the
/// layout, the threads, the instruction set or how a prompt is cut.
#[derive(Debug)]
pub struct Model {
    config: Config,
    tokenizer: Tokenizer,
    tokenizer_config: Option<Vec<u8>>,
    chat_template: Option<Vec<u8>>,
    inverse_frequencies: Vec<f32>,
    layers: Vec<Layer>,
    final_norm: Vec<f32>,
    ids: Ids,
    weights: Box<dyn Weights>,
    /// What its store has decided, if it has one.
    residency: Option<Residency>,
    /// Bytes of norms and biases.
    vectors_bytes: usize,
}

impl Model {
    /// Loads an original or packed checkpoint directory, with its matrices in
    /// a [`WeightStore`].
    ///
    /// # Errors
    ///
    /// If the model is not supported, files or tensors are missing or of
    /// another shape than `config.json` gives, weights do not decode, or
    /// `options` allow less memory than the model needs
    /// ([`RuntimeError::Memory`]).
    pub fn load(
        path: &Path,
        options: StoreOptions,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Self, RuntimeError> {
        let opened = Opened::new(path)?;
        let mut loader = opened.loader(options.isa, progress)?;
        let (layers, final_norm) = load_vectors(&mut loader, &opened.config)?;
        let vectors_bytes = loader.weights_bytes();
        let sources = loader.sources(&opened.config, options.direct)?;
        let ids = Ids::of(&opened.config);
        let plan = Plan::new(&sources, ids, &options, vectors_bytes)?;
        let store = WeightStore::new(sources, ids, &plan, options, |bytes| loader.loaded(bytes))?;
        let residency = Some(store.residency());
        opened.model(layers, final_norm, Box::new(store), residency, vectors_bytes)
    }

    /// Loads everything but the matrices, which are taken from `weights`.
    ///
    /// # Errors
    ///
    /// As [`Model::load`].
    pub fn with_weights(path: &Path, weights: Box<dyn Weights>) -> Result<Self, RuntimeError> {
        let opened = Opened::new(path)?;
        let mut progress = |_| ();
        let mut loader = opened.loader(Isa::best(), &mut progress)?;
        let (layers, final_norm) = load_vectors(&mut loader, &opened.config)?;
        let vectors_bytes = loader.weights_bytes();
        opened.model(layers, final_norm, weights, None, vectors_bytes)
    }

    /// Bytes that the weights of a checkpoint take, about, if all of them stay
    /// in memory in this layout. Reads headers only.
    ///
    /// # Errors
    ///
    /// As [`Model::load`].
    pub fn expected_bytes(path: &Path, layout: Layout) -> Result<u64, RuntimeError> {
        let opened = Opened::new(path)?;
        let mut progress = |_| ();
        let loader = opened.loader(Isa::best(), &mut progress)?;
        let matrices = store::expected_bytes(&loader.sources(&opened.config, false)?, layout);
        let vectors: usize = (tensors::all(&opened.config).iter())
            .filter(|(_, shape)| shape.len() == 1)
            .map(|(_, shape)| shape[0] * size_of::<f32>())
            .sum();
        Ok((matrices + vectors) as u64)
    }

    /// Puts something between the model and its weights.
    pub(crate) fn wrap_weights(
        self,
        wrap: impl FnOnce(Box<dyn Weights>) -> Box<dyn Weights>,
    ) -> Self {
        Self { weights: wrap(self.weights), ..self }
    }

    /// Its shape.
    #[must_use]
    pub const fn config(&self) -> &Config {
        &self.config
    }

    /// Its tokenizer.
    #[must_use]
    pub const fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// Its chat template.
    ///
    /// # Errors
    ///
    /// As [`ChatTemplate::parse`].
    pub fn chat_template(&self) -> Result<ChatTemplate, RuntimeError> {
        let config = self.tokenizer_config.as_deref().unwrap_or(b"{}");
        ChatTemplate::parse(config, self.chat_template.as_deref())
    }

    /// Bytes the weights take in memory, as they are held, buffers included.
    #[must_use]
    pub fn weights_bytes(&self) -> usize {
        self.vectors_bytes + self.weights.resident_bytes()
    }

    /// How many matrices stay in memory; `None` if the model has no store.
    #[must_use]
    pub const fn residency(&self) -> Option<Residency> {
        self.residency
    }
}

/// A checkpoint and what its files beside the tensors say.
struct Opened {
    checkpoint: Arc<Checkpoint>,
    config: Config,
    tokenizer: Tokenizer,
}

impl Opened {
    fn new(path: &Path) -> Result<Self, RuntimeError> {
        let checkpoint = Checkpoint::open(path)?;
        let required = |file| -> Result<Vec<u8>, RuntimeError> {
            checkpoint.file_bytes(file)?.ok_or(RuntimeError::MissingFile { file })
        };
        let config = Config::parse(
            &required("config.json")?,
            checkpoint.file_bytes("generation_config.json")?.as_deref(),
        )?;
        let tokenizer = Tokenizer::parse(&required("tokenizer.json")?)?;
        Ok(Self { checkpoint: Arc::new(checkpoint), config, tokenizer })
    }

    fn loader<'a>(
        &'a self,
        isa: Isa,
        progress: &'a mut dyn FnMut(LoadProgress),
    ) -> Result<Loader<'a>, RuntimeError> {
        Loader::new(&self.checkpoint, &self.config, isa, progress)
    }

    fn model(
        self,
        layers: Vec<Layer>,
        final_norm: Vec<f32>,
        weights: Box<dyn Weights>,
        residency: Option<Residency>,
        vectors_bytes: usize,
    ) -> Result<Model, RuntimeError> {
        Ok(Model {
            tokenizer: self.tokenizer,
            tokenizer_config: self.checkpoint.file_bytes("tokenizer_config.json")?,
            chat_template: self.checkpoint.file_bytes("chat_template.jinja")?,
            inverse_frequencies: self.config.rope.inverse_frequencies(self.config.head_dim),
            layers,
            final_norm,
            ids: Ids::of(&self.config),
            weights,
            residency,
            vectors_bytes,
            config: self.config,
        })
    }
}

/// The norms and biases of all layers, and the last norm.
fn load_vectors(
    loader: &mut Loader<'_>,
    config: &Config,
) -> Result<(Vec<Layer>, Vec<f32>), RuntimeError> {
    let layers = (0..config.n_layers).map(|layer| load_layer(loader, config, layer));
    let layers = layers.collect::<Result<_, _>>()?;
    Ok((layers, loader.vector(tensors::FINAL_NORM, config.hidden_size)?))
}

fn load_layer(
    loader: &mut Loader<'_>,
    config: &Config,
    layer: usize,
) -> Result<Layer, RuntimeError> {
    let mut norms = tensors::norms(config)
        .into_iter()
        .map(|(name, length)| loader.vector(&tensors::in_layer(layer, name), length))
        .collect::<Result<Vec<_>, _>>()?
        .into_iter();
    let mut norm = || norms.next().unwrap_or_default();
    let (input_norm, post_attention_norm) = (norm(), norm());
    let qk_norm = config.qk_norm.then(|| (norm(), norm()));
    let mut index = 0;
    let [q, k, v, o, gate, up, down] = tensors::linears(config).map(|(name, rows, _, bias)| {
        let weight = Ids::of(config).linear(layer, index);
        index += 1;
        let name = tensors::in_layer(layer, &format!("{name}.bias"));
        let bias = if bias { Some(loader.vector(&name, rows)?) } else { None };
        Ok::<_, RuntimeError>(Linear { weight, bias })
    });
    Ok(Layer {
        input_norm,
        post_attention_norm,
        qk_norm,
        q: q?,
        k: k?,
        v: v?,
        o: o?,
        gate: gate?,
        up: up?,
        down: down?,
    })
}

/// Tokens multiplied at once, unless told otherwise.
pub const DEFAULT_CHUNK: usize = 64;

/// One sequence that a model is run over: its keys and values, and the memory
/// a step needs, kept from step to step.
#[derive(Debug)]
pub struct Session<'m> {
    model: &'m Model,
    capacity: usize,
    chunk: usize,
    /// Tokens run so far.
    n_tokens: usize,
    cache: Vec<LayerCache>,
    scratch: Scratch,
    logits: Vec<f32>,
}

/// Intermediate results of a chunk, `[token][element]` each.
#[derive(Debug, Default)]
struct Scratch {
    /// The residual stream.
    x: Vec<f32>,
    normed: Vec<f32>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    attention: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    /// What a block adds to the residual stream.
    delta: Vec<f32>,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl<'m> Session<'m> {
    /// A session of at most `capacity` tokens that processes prompts `chunk`
    /// tokens at a time.
    ///
    /// # Errors
    ///
    /// [`RuntimeError::ContextLength`] if the model is not made for so many.
    pub fn new(model: &'m Model, capacity: usize, chunk: usize) -> Result<Self, RuntimeError> {
        let limit = model.config.max_position_embeddings;
        if capacity > limit {
            return Err(RuntimeError::ContextLength { found: capacity, capacity: limit });
        }
        let layers = 0..model.config.n_layers;
        Ok(Self {
            model,
            capacity,
            chunk: chunk.max(1),
            n_tokens: 0,
            cache: layers.map(|_| LayerCache::new(&model.config, capacity)).collect(),
            scratch: Scratch::default(),
            logits: Vec::new(),
        })
    }

    /// The model.
    #[must_use]
    pub const fn model(&self) -> &'m Model {
        self.model
    }

    /// Tokens run so far.
    #[must_use]
    pub const fn n_tokens(&self) -> usize {
        self.n_tokens
    }

    /// Tokens there is room for.
    #[must_use]
    pub const fn capacity(&self) -> usize {
        self.capacity
    }

    /// What the last [`Session::forward`] returned.
    #[must_use]
    pub fn logits(&self) -> &[f32] {
        &self.logits
    }

    /// Forgets all tokens.
    pub fn clear(&mut self) {
        self.n_tokens = 0;
    }

    /// Runs the model over `tokens`, which follow those run before. Returns
    /// the logits after each of the last `n_logits` of them, `[token][vocabulary]`.
    ///
    /// # Errors
    ///
    /// [`RuntimeError::ContextLength`] and [`RuntimeError::TokenId`], before
    /// anything is run; [`RuntimeError::NotFinite`] if a logit is not a number.
    pub fn forward(&mut self, tokens: &[u32], n_logits: usize) -> Result<&[f32], RuntimeError> {
        self.check(tokens)?;
        let vocabulary = self.model.config.vocab_size;
        let first_logit = tokens.len().saturating_sub(n_logits);
        self.logits.resize((tokens.len() - first_logit) * vocabulary, 0.0);
        let mut done = 0;
        for chunk in tokens.chunks(self.chunk) {
            let position = self.n_tokens;
            self.run_layers(chunk)?;
            self.n_tokens += chunk.len();
            let end = done + chunk.len();
            let wanted = done.max(first_logit)..end;
            if !wanted.is_empty() {
                let out =
                    (wanted.start - first_logit) * vocabulary..(end - first_logit) * vocabulary;
                self.write_logits(wanted.start - done, out.clone())?;
                check_finite(&self.logits[out], vocabulary, position + wanted.start - done)?;
            }
            done = end;
        }
        Ok(&self.logits)
    }

    fn check(&self, tokens: &[u32]) -> Result<(), RuntimeError> {
        let vocabulary = self.model.config.vocab_size;
        let found = self.n_tokens + tokens.len();
        if found > self.capacity {
            return Err(RuntimeError::ContextLength { found, capacity: self.capacity });
        }
        match tokens.iter().find(|&&token| token as usize >= vocabulary) {
            Some(&found) => Err(RuntimeError::TokenId { found, vocabulary }),
            None => Ok(()),
        }
    }

    /// Leaves the residual stream after the last layer in `scratch.x`.
    fn run_layers(&mut self, tokens: &[u32]) -> Result<(), RuntimeError> {
        let model = self.model;
        self.scratch.resize(&model.config, tokens.len());
        let rows = self.scratch.x.chunks_exact_mut(model.config.hidden_size);
        for (row, &token) in rows.zip(tokens) {
            model.weights.row(model.ids.embedding(), token as usize, row)?;
        }
        let half = model.config.head_dim / 2;
        let angles =
            self.scratch.cos.chunks_exact_mut(half).zip(self.scratch.sin.chunks_exact_mut(half));
        for (index, (cos, sin)) in angles.enumerate() {
            rotation(self.n_tokens + index, &model.inverse_frequencies, cos, sin);
        }
        for (index, layer) in model.layers.iter().enumerate() {
            let cache = &mut self.cache[index];
            let window = model.config.windows[index];
            self.scratch.attention_block(model, layer, cache, window, self.n_tokens)?;
            self.scratch.feed_forward_block(model, layer)?;
        }
        Ok(())
    }

    /// Logits of the chunk's tokens from `first` on, into `self.logits[out]`.
    fn write_logits(
        &mut self,
        first: usize,
        out: std::ops::Range<usize>,
    ) -> Result<(), RuntimeError> {
        let model = self.model;
        let hidden = model.config.hidden_size;
        let scratch = &mut self.scratch;
        scratch.norm_rows(&model.final_norm, model.config.rms_norm_eps);
        let x = &scratch.normed[first * hidden..];
        model.weights.multiply(model.ids.head(), x, &mut self.logits[out])
    }
}

impl Scratch {
    fn resize(&mut self, config: &Config, n_tokens: usize) {
        let (q, kv) = (config.q_dim(), config.kv_dim());
        for (buffer, elems) in [
            (&mut self.x, config.hidden_size),
            (&mut self.normed, config.hidden_size),
            (&mut self.q, q),
            (&mut self.k, kv),
            (&mut self.v, kv),
            (&mut self.attention, q),
            (&mut self.gate, config.intermediate_size),
            (&mut self.up, config.intermediate_size),
            (&mut self.delta, config.hidden_size),
            (&mut self.cos, config.head_dim / 2),
            (&mut self.sin, config.head_dim / 2),
        ] {
            buffer.resize(n_tokens * elems, 0.0);
        }
    }

    fn norm_rows(&mut self, weight: &[f32], eps: f32) {
        let n = weight.len();
        for (x, out) in self.x.chunks_exact(n).zip(self.normed.chunks_exact_mut(n)) {
            rms_norm(x, weight, eps, out);
        }
    }

    fn attention_block(
        &mut self,
        model: &Model,
        layer: &Layer,
        cache: &mut LayerCache,
        window: Option<usize>,
        position: usize,
    ) -> Result<(), RuntimeError> {
        let (config, weights) = (&model.config, &*model.weights);
        self.norm_rows(&layer.input_norm, config.rms_norm_eps);
        layer.q.apply(weights, &self.normed, &mut self.q)?;
        layer.k.apply(weights, &self.normed, &mut self.k)?;
        layer.v.apply(weights, &self.normed, &mut self.v)?;
        let norms = layer.qk_norm.as_ref();
        self.place(config, norms.map(|n| n.0.as_slice()), Head::Query);
        self.place(config, norms.map(|n| n.1.as_slice()), Head::Key);
        let kv = config.kv_dim();
        let rows = self.k.chunks_exact(kv).zip(self.v.chunks_exact(kv));
        for (index, (keys, values)) in rows.enumerate() {
            cache.store(position + index, keys, values);
        }
        cache.attend(config, window, position, &self.q, &mut self.attention);
        layer.o.apply(weights, &self.attention, &mut self.delta)?;
        add(&mut self.x, &self.delta);
        Ok(())
    }

    /// Normalises, where the model does, and turns every head of q or k.
    fn place(&mut self, config: &Config, norm: Option<&[f32]>, which: Head) {
        let (head_dim, half) = (config.head_dim, config.head_dim / 2);
        let (heads, n_heads) = match which {
            Head::Query => (&mut self.q, config.n_heads),
            Head::Key => (&mut self.k, config.n_kv_heads),
        };
        for (index, head) in heads.chunks_exact_mut(head_dim).enumerate() {
            if let Some(weight) = norm {
                rms_norm_in_place(head, weight, config.rms_norm_eps);
            }
            let angles = index / n_heads * half..(index / n_heads + 1) * half;
            rotate(head, &self.cos[angles.clone()], &self.sin[angles]);
        }
    }

    fn feed_forward_block(&mut self, model: &Model, layer: &Layer) -> Result<(), RuntimeError> {
        let weights = &*model.weights;
        self.norm_rows(&layer.post_attention_norm, model.config.rms_norm_eps);
        layer.gate.apply(weights, &self.normed, &mut self.gate)?;
        layer.up.apply(weights, &self.normed, &mut self.up)?;
        let chunks = self.gate.par_chunks_mut(ELEMENTS_PER_JOB);
        chunks.zip(self.up.par_chunks(ELEMENTS_PER_JOB)).for_each(|(gate, up)| swiglu(gate, up));
        layer.down.apply(weights, &self.gate, &mut self.delta)?;
        add(&mut self.x, &self.delta);
        Ok(())
    }
}

/// Elements of the feed-forward part that one job activates.
const ELEMENTS_PER_JOB: usize = 4096;

#[derive(Clone, Copy)]
enum Head {
    Query,
    Key,
}

impl Linear {
    /// `y = x * weight^T + bias`, for every row of `x`.
    fn apply(&self, weights: &dyn Weights, x: &[f32], y: &mut [f32]) -> Result<(), RuntimeError> {
        weights.multiply(self.weight, x, y)?;
        if let Some(bias) = &self.bias {
            y.chunks_exact_mut(bias.len()).for_each(|row| add(row, bias));
        }
        Ok(())
    }
}

fn check_finite(logits: &[f32], vocabulary: usize, position: usize) -> Result<(), RuntimeError> {
    match logits.iter().position(|logit| !logit.is_finite()) {
        None => Ok(()),
        Some(index) => Err(RuntimeError::NotFinite {
            position: position + index / vocabulary,
            token: index % vocabulary,
            found: logits[index],
        }),
    }
}
