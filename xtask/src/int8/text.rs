//! Texts of the experiment, from the books that training holds out.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::Failure;

/// One book a line; every tenth is held out.
pub const CORPUS: &str = "../shared/corpus/english_novels.jsonl.zst";
/// Every so manieth book.
const HELD_OUT: usize = 10;
/// Name of a text from books that are not held out.
pub const CALIBRATION: &str = "calibration.txt";
const CALIBRATION_CHARS: usize = 40_000;
const PROMPTS: usize = 100;
const PROMPT_WORDS: usize = 12;
/// Of each held-out book, for the perplexity.
const VALIDATION_CHARS: usize = 48_000;

/// Where they were written.
pub struct Files {
    /// One prompt a line.
    pub prompts: PathBuf,
    /// For the perplexity.
    pub validation: PathBuf,
}

impl Files {
    /// Bytes of each: another selection of text has another size.
    pub fn sizes(&self) -> Result<Vec<u64>, Failure> {
        [&self.prompts, &self.validation]
            .map(|path| {
                fs::metadata(path)
                    .map(|of| of.len())
                    .map_err(|e| format!("{}: {e}", path.display()))
            })
            .into_iter()
            .collect()
    }
}

/// Writes prompts, validation text and calibration text into `folder`.
pub fn write(folder: &Path) -> Result<Files, Failure> {
    let books = books()?;
    let is_held_out = |index: usize| index % HELD_OUT == HELD_OUT - 1;
    let (held_out, others): (Vec<_>, Vec<_>) =
        books.iter().enumerate().partition(|(index, _)| is_held_out(*index));
    let held_out: Vec<&str> = held_out.into_iter().map(|(_, book)| book.as_str()).collect();
    if held_out.is_empty() || others.is_empty() {
        return Err(format!("{CORPUS}: {} books, expected at least {HELD_OUT}", books.len()));
    }
    let files =
        Files { prompts: folder.join("prompts.txt"), validation: folder.join("validation.txt") };
    let validation: String = held_out.iter().map(|book| middle(book, VALIDATION_CHARS)).collect();
    let calibration = middle(others[others.len() / 2].1, CALIBRATION_CHARS);
    for (path, content) in [
        (&files.prompts, prompts(&held_out)),
        (&files.validation, validation),
        (&folder.join(CALIBRATION), calibration),
    ] {
        fs::write(path, content).map_err(|e| format!("{}: {e}", path.display()))?;
    }
    Ok(files)
}

fn books() -> Result<Vec<String>, Failure> {
    let open = File::open(CORPUS).and_then(zstd::Decoder::new);
    let lines = BufReader::new(open.map_err(|e| format!("{CORPUS}: {e}"))?).lines();
    lines
        .map(|line| {
            let line = line.map_err(|e| format!("{CORPUS}: {e}"))?;
            let book: Value = serde_json::from_str(&line).map_err(|e| format!("{CORPUS}: {e}"))?;
            let text =
                book["text"].as_str().ok_or_else(|| format!("{CORPUS}: book without text"))?;
            Ok(text.to_owned())
        })
        .collect()
}

/// So many characters from the middle of a text.
fn middle(text: &str, n_chars: usize) -> String {
    let skip = text.chars().count().saturating_sub(n_chars) / 2;
    text.chars().skip(skip).take(n_chars).collect()
}

/// Beginnings of sentences, evenly from all books, a line each.
fn prompts(books: &[&str]) -> String {
    let mut lines = String::new();
    for index in 0..PROMPTS {
        let book = books[index % books.len()];
        let share = (index / books.len()) as f64 / PROMPTS.div_ceil(books.len()) as f64;
        let from = book.len() / 10 + (share * 0.8 * book.len() as f64) as usize;
        let rest: String = book.chars().skip(from).take(4000).collect();
        let start = rest.find(". ").map_or(0, |at| at + 2);
        let words: Vec<&str> = rest[start..].split_whitespace().take(PROMPT_WORDS).collect();
        lines += &words.join(" ");
        lines.push('\n');
    }
    lines
}
