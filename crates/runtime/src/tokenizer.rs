//! Text to token ids and back.

use crate::error::RuntimeError;

/// A `tokenizer.json`.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
}

impl Tokenizer {
    /// Reads the content of a `tokenizer.json`.
    ///
    /// # Errors
    ///
    /// [`RuntimeError::Tokenizer`] if it is not one.
    pub fn parse(bytes: &[u8]) -> Result<Self, RuntimeError> {
        let inner = tokenizers::Tokenizer::from_bytes(bytes).map_err(wrap)?;
        Ok(Self { inner })
    }

    /// Token ids of `text`. `add_special_tokens` puts the tokens before and
    /// after that the tokenizer prescribes; a rendered chat has its own.
    ///
    /// # Errors
    ///
    /// [`RuntimeError::Tokenizer`] if the text cannot be tokenised.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, RuntimeError> {
        let encoding = self.inner.encode(text, add_special_tokens).map_err(wrap)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Text of `ids`, without special tokens.
    ///
    /// # Errors
    ///
    /// [`RuntimeError::Tokenizer`] if an id has no token.
    pub fn decode(&self, ids: &[u32]) -> Result<String, RuntimeError> {
        self.inner.decode(ids, true).map_err(wrap)
    }

    /// Text of `ids` as a continuation of `prompt_ids`.
    ///
    /// Decoded together: many tokenizers take a space from the first token of
    /// a text, and a continuation has to keep its own.
    ///
    /// # Errors
    ///
    /// As [`Tokenizer::decode`].
    pub fn decode_continuation(
        &self,
        prompt_ids: &[u32],
        ids: &[u32],
    ) -> Result<String, RuntimeError> {
        let prompt = self.decode(prompt_ids)?;
        let whole = self.decode(&[prompt_ids, ids].concat())?;
        // A prompt that ends inside a character decodes to a replacement
        // character, which the continuation completes.
        let shared = whole.bytes().zip(prompt.bytes()).take_while(|(a, b)| a == b).count();
        let start = (0..=shared).rev().find(|&i| whole.is_char_boundary(i)).unwrap_or(0);
        Ok(whole[start..].to_owned())
    }
}

/// Turns tokens into text as they come, whole characters at a time.
#[derive(Debug)]
pub struct StreamDecoder<'t> {
    tokenizer: &'t Tokenizer,
    ids: Vec<u32>,
    /// Decoding starts here: a token whose text is out already, so that what
    /// a decoder does to the first token of a text happens to that one.
    start: usize,
    /// Text of the tokens before this is out.
    done: usize,
}

impl<'t> StreamDecoder<'t> {
    /// A decoder of what follows `prompt_ids`.
    #[must_use]
    pub fn new(tokenizer: &'t Tokenizer, prompt_ids: &[u32]) -> Self {
        Self { tokenizer, ids: prompt_ids.to_vec(), start: 0, done: prompt_ids.len() }
    }

    /// Takes a token; the text that is certain now, perhaps none.
    ///
    /// # Errors
    ///
    /// As [`Tokenizer::decode`].
    pub fn push(&mut self, id: u32) -> Result<String, RuntimeError> {
        self.ids.push(id);
        let (known, text) = self.window()?;
        // A replacement character at the end may be half of a character.
        if text.len() <= known.len() || text.ends_with('\u{fffd}') {
            return Ok(String::new());
        }
        self.start = self.done;
        self.done = self.ids.len();
        Ok(new_part(&known, &text))
    }

    /// What was held back, when no more tokens come.
    ///
    /// # Errors
    ///
    /// As [`Tokenizer::decode`].
    pub fn finish(self) -> Result<String, RuntimeError> {
        let (known, text) = self.window()?;
        Ok(new_part(&known, &text))
    }

    fn window(&self) -> Result<(String, String), RuntimeError> {
        let known = self.tokenizer.decode(&self.ids[self.start..self.done])?;
        let text = self.tokenizer.decode(&self.ids[self.start..])?;
        Ok((known, text))
    }
}

fn new_part(known: &str, text: &str) -> String {
    text.get(known.len()..).unwrap_or_default().to_owned()
}

fn wrap(error: tokenizers::Error) -> RuntimeError {
    RuntimeError::Tokenizer(error.to_string())
}
