//! Texts, and the tokens they are made of.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use burn_tensor::backend::Backend;
use burn_tensor::{Int, Tensor, TensorData};
use serde::Deserialize;
use serde_json::json;
use tokenizers::decoders::byte_level::ByteLevel;
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::{
    AddedToken, DecoderWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper,
    TokenizerBuilder,
};

use crate::error::{At, TrainError};
use crate::random::SplitMix64;

/// The token before every text, and its id.
pub const BEGIN: (&str, u32) = ("<|begin|>", 0);
/// The token after every text, and its id.
pub const END: (&str, u32) = ("<|end|>", 1);
/// The smallest vocabulary: every byte, and the tokens around a text.
pub const MIN_VOCABULARY: usize = 256 + 2;
/// Of as many books in a row, the last is held out.
pub const HOLD_OUT: usize = 10;

/// Books, in the order they were read.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Books {
    /// Those to learn from.
    pub training: Vec<String>,
    /// Every tenth, to validate with.
    pub validation: Vec<String>,
}

impl Books {
    /// Reads books: a `.txt` file is one, a `.jsonl` file one a line, in the
    /// field `text`; both may be compressed with zstd (`.zst`). Of a directory,
    /// such files are read in the order of their names. With fewer than ten books the end of
    /// the last one is held out.
    ///
    /// # Errors
    ///
    /// [`TrainError::Io`], or [`TrainError::Text`] if a file is none of these.
    pub fn read(paths: &[PathBuf]) -> Result<Self, TrainError> {
        let mut books = Self::default();
        for path in paths {
            if path.is_dir() {
                let entries: Result<Vec<_>, _> = fs::read_dir(path).at(path)?.collect();
                let mut files: Vec<PathBuf> =
                    entries.at(path)?.into_iter().map(|entry| entry.path()).collect();
                files.retain(|file| kind(file).is_some() && file.is_file());
                files.sort();
                for file in files {
                    books.read_file(&file)?;
                }
            } else {
                books.read_file(path)?;
            }
        }
        books.hold_out_an_end();
        Ok(books)
    }

    /// The last tenth of the last book, if no book is held out.
    fn hold_out_an_end(&mut self) {
        if !self.validation.is_empty() {
            return;
        }
        if let Some(book) = self.training.last_mut() {
            let wanted = book.len() - book.len() / HOLD_OUT;
            let at = (0..=wanted).rev().find(|&at| book.is_char_boundary(at)).unwrap_or(0);
            self.validation.push(book.split_off(at));
        }
    }

    /// Adds a book.
    pub fn push(&mut self, text: String) {
        let index = self.training.len() + self.validation.len();
        if index % HOLD_OUT == HOLD_OUT - 1 {
            self.validation.push(text);
        } else {
            self.training.push(text);
        }
    }

    fn read_file(&mut self, path: &Path) -> Result<(), TrainError> {
        let wrong = |reason: String| TrainError::Text { path: path.to_owned(), reason };
        let (kind, compressed) = kind(path)
            .ok_or_else(|| wrong("expected .txt or .jsonl, or these with .zst".to_owned()))?;
        let file = File::open(path).at(path)?;
        let reader: Box<dyn Read> =
            if compressed { Box::new(zstd::Decoder::new(file).at(path)?) } else { Box::new(file) };
        let mut reader = BufReader::with_capacity(1 << 20, reader);
        match kind {
            Kind::Text => {
                let mut text = String::new();
                reader.read_to_string(&mut text).at(path)?;
                self.push(text);
            }
            Kind::Lines => {
                for (index, line) in reader.lines().enumerate() {
                    let line = line.at(path)?;
                    if line.trim().is_empty() {
                        continue;
                    }
                    let line: Line = serde_json::from_str(&line)
                        .map_err(|error| wrong(format!("line {}: {error}", index + 1)))?;
                    self.push(line.text);
                }
            }
        }
        Ok(())
    }
}

#[derive(Deserialize)]
struct Line {
    text: String,
}

#[derive(Clone, Copy)]
enum Kind {
    Text,
    Lines,
}

/// What a file holds by its name, and whether it is compressed.
fn kind(path: &Path) -> Option<(Kind, bool)> {
    let name = path.file_name()?.to_str()?;
    let plain = name.strip_suffix(".zst");
    let kind = match plain.unwrap_or(name).rsplit_once('.')?.1 {
        "txt" => Kind::Text,
        "jsonl" => Kind::Lines,
        _ => return None,
    };
    Some((kind, plain.is_some()))
}

/// A byte-level tokenizer: the content of a `tokenizer.json`.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    json: String,
    inner: tokenizers::Tokenizer,
}

impl Tokenizer {
    /// Learns byte pairs until there are `vocab_size` tokens or no pair is left
    /// that occurs twice.
    ///
    /// # Errors
    ///
    /// [`TrainError::Field`] if `vocab_size` has no room for the bytes,
    /// [`TrainError::Tokenizer`] if it cannot be trained.
    pub fn train(texts: &[String], vocab_size: usize) -> Result<Self, TrainError> {
        if vocab_size < MIN_VOCABULARY {
            return Err(TrainError::Field {
                field: "vocab_size",
                found: vocab_size.to_string(),
                expected: format!("at least {MIN_VOCABULARY}"),
            });
        }
        let special = |(content, _): (&str, u32)| AddedToken::from(content.to_owned(), true);
        let mut trainer = BpeTrainerBuilder::new()
            .show_progress(false)
            .vocab_size(vocab_size)
            .min_frequency(2)
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .special_tokens(vec![special(BEGIN), special(END)])
            .build();
        let level = ByteLevel::new(false, false, true);
        let mut tokenizer = TokenizerBuilder::<
            BPE,
            NormalizerWrapper,
            PreTokenizerWrapper,
            PostProcessorWrapper,
            DecoderWrapper,
        >::new()
        .with_model(BPE::default())
        .with_pre_tokenizer(Some(level.into()))
        .with_decoder(Some(level.into()))
        .build()
        .map_err(wrap)?;
        tokenizer.train(&mut trainer, texts.iter().map(String::as_str)).map_err(wrap)?;
        let mut value = serde_json::to_value(&tokenizer).map_err(wrap)?;
        // A text starts with its own token.
        let (content, id) = BEGIN;
        value["post_processor"] = json!({
            "type": "TemplateProcessing",
            "single": [
                { "SpecialToken": { "id": content, "type_id": 0 } },
                { "Sequence": { "id": "A", "type_id": 0 } },
            ],
            "pair": [
                { "Sequence": { "id": "A", "type_id": 0 } },
                { "Sequence": { "id": "B", "type_id": 1 } },
            ],
            "special_tokens": { content: { "id": content, "ids": [id], "tokens": [content] } },
        });
        Self::parse(serde_json::to_string_pretty(&value).map_err(wrap)? + "\n")
    }

    /// Reads the content of a `tokenizer.json` that [`Tokenizer::train`] made.
    ///
    /// # Errors
    ///
    /// [`TrainError::Tokenizer`] if it is not one.
    pub fn parse(json: String) -> Result<Self, TrainError> {
        let inner = tokenizers::Tokenizer::from_bytes(&json).map_err(wrap)?;
        for (content, id) in [BEGIN, END] {
            if inner.token_to_id(content) != Some(id) {
                return Err(TrainError::Tokenizer(format!("`{content}` is not token {id}")));
            }
        }
        Ok(Self { json, inner })
    }

    /// The content of `tokenizer.json`.
    #[must_use]
    pub fn json(&self) -> &str {
        &self.json
    }

    /// Tokens there are.
    #[must_use]
    pub fn n_tokens(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// Tokens of all texts one after the other, each between its begin and end.
    ///
    /// # Errors
    ///
    /// [`TrainError::Tokenizer`] if a text cannot be tokenised.
    pub fn encode(&self, texts: &[String]) -> Result<Vec<u32>, TrainError> {
        let mut tokens = Vec::new();
        // A few books at a time: encodings take many times the memory of tokens.
        for texts in texts.chunks(16) {
            let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
            for encoding in self.inner.encode_batch_fast(texts, false).map_err(wrap)? {
                tokens.push(BEGIN.1);
                tokens.extend_from_slice(encoding.get_ids());
                tokens.push(END.1);
            }
        }
        Ok(tokens)
    }
}

fn wrap(error: impl ToString) -> TrainError {
    TrainError::Tokenizer(error.to_string())
}

/// Sequences and, for each token, the one that follows, both `[sequences, tokens]`.
#[derive(Debug, Clone)]
pub struct Batch<B: Backend> {
    /// What the model sees.
    pub inputs: Tensor<B, 2, Int>,
    /// What it should say.
    pub targets: Tensor<B, 2, Int>,
}

impl<B: Backend> Batch<B> {
    /// The sequences of `length` that start at `starts` in `stream`.
    ///
    /// # Panics
    ///
    /// If one of them and its next token are not within the stream.
    #[must_use]
    pub fn new(stream: &[u32], starts: &[usize], length: usize, device: &B::Device) -> Self {
        let gather = |shift: usize| {
            let ids: Vec<i32> = (starts.iter())
                .flat_map(|start| &stream[start + shift..start + shift + length])
                .map(|id| *id as i32)
                .collect();
            Tensor::from_data(TensorData::new(ids, [starts.len(), length]), device)
        };
        Self { inputs: gather(0), targets: gather(1) }
    }
}

/// Where the sequences of a batch start: a function of the seed and the batch's
/// number, so that a run goes on as if it had not stopped.
#[must_use]
pub fn random_starts(
    seed: u64,
    batch: u64,
    n_sequences: usize,
    stream_len: usize,
    length: usize,
) -> Vec<usize> {
    let mut random = SplitMix64::new(seed ^ 0x6261_7463_6865_7321, batch);
    let places = stream_len.saturating_sub(length).max(1);
    (0..n_sequences).map(|_| random.below(places)).collect()
}
