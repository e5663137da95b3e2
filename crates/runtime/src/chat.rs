//! A conversation rendered the way the model was trained on it.

use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, Error, ErrorKind, context};
use serde_json::Value;

use crate::error::RuntimeError;

/// A turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// What was said.
    pub content: String,
}

impl Message {
    /// A turn of the user.
    #[must_use]
    pub fn user(content: impl Into<String>) -> Self {
        Self { role: "user".into(), content: content.into() }
    }
}

/// A model's chat template and the tokens it may name.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos_token: String,
    eos_token: String,
}

impl ChatTemplate {
    /// Reads `tokenizer_config.json` and, if there is one, `chat_template.jinja`,
    /// which counts before the other.
    ///
    /// # Errors
    ///
    /// [`RuntimeError::NoChatTemplate`] if neither has one,
    /// [`RuntimeError::ChatTemplate`] if it does not parse.
    pub fn parse(tokenizer_config: &[u8], jinja: Option<&[u8]>) -> Result<Self, RuntimeError> {
        let config: Value = serde_json::from_slice(tokenizer_config)
            .map_err(|source| RuntimeError::Json { file: "tokenizer_config.json", source })?;
        let source = match jinja {
            Some(bytes) => std::str::from_utf8(bytes)
                .map_err(|error| RuntimeError::ChatTemplate(error.to_string()))?,
            None => template_of(config.get("chat_template")).ok_or(RuntimeError::NoChatTemplate)?,
        };
        Ok(Self {
            environment: environment(source)
                .map_err(|error| RuntimeError::ChatTemplate(describe(&error)))?,
            bos_token: special_token(&config, "bos_token"),
            eos_token: special_token(&config, "eos_token"),
        })
    }

    /// The conversation as the model wants to see it, with its special tokens
    /// in it, up to where the assistant's next turn begins.
    ///
    /// # Errors
    ///
    /// [`RuntimeError::ChatTemplate`] if the template fails or refuses.
    pub fn render(&self, messages: &[Message]) -> Result<String, RuntimeError> {
        let messages: Vec<minijinja::Value> =
            messages.iter().map(|m| context! { role => &m.role, content => &m.content }).collect();
        let rendered = self.environment.get_template(NAME).and_then(|template| {
            template.render(context! {
                messages,
                bos_token => &self.bos_token,
                eos_token => &self.eos_token,
                add_generation_prompt => true,
            })
        });
        rendered.map_err(|error| RuntimeError::ChatTemplate(describe(&error)))
    }
}

const NAME: &str = "chat_template";

/// A string, or a list of named ones of which `default` counts.
fn template_of(value: Option<&Value>) -> Option<&str> {
    match value? {
        Value::String(source) => Some(source),
        Value::Array(named) => named
            .iter()
            .find(|entry| entry.get("name").is_some_and(|name| name == "default"))
            .and_then(|entry| entry.get("template")?.as_str()),
        _ => None,
    }
}

/// A string, or an object with the string in `content`; empty if absent.
fn special_token(config: &Value, field: &str) -> String {
    let value = config.get(field);
    let text = value.and_then(|v| v.as_str().or_else(|| v.get("content")?.as_str()));
    text.unwrap_or_default().to_owned()
}

/// Set up like the one of `transformers`.
fn environment(source: &str) -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function("raise_exception", |message: String| -> Result<String, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_function("strftime_now", |format: String| strftime(&format, seconds_now()));
    environment.add_template_owned(NAME, without_generation_blocks(source))?;
    Ok(environment)
}

/// Templates mark the assistant's words for training with `{% generation %}`
/// blocks, which no engine but that of `transformers` knows. A condition that
/// always holds renders the same, whitespace control included.
fn without_generation_blocks(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let Some(length) = rest[start..].find("%}") else { break };
        let tag = &rest[start + 2..start + length];
        let word = tag.trim_matches(['-', '+']).trim();
        let replacement = match word {
            "generation" => Some("if true"),
            "endgeneration" => Some("endif"),
            _ => None,
        };
        out.push_str(&rest[..start + 2]);
        match replacement {
            Some(replacement) => out.push_str(&tag.replacen(word, &format!(" {replacement} "), 1)),
            None => out.push_str(tag),
        }
        out.push_str("%}");
        rest = &rest[start + length + 2..];
    }
    out.push_str(rest);
    out
}

fn describe(error: &Error) -> String {
    let line = error.line().map_or_else(String::new, |line| format!(" (line {line})"));
    match error.detail() {
        Some(detail) => format!("{detail}{line}"),
        None => format!("{}{line}", error.kind()),
    }
}

fn seconds_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

const DAYS: [&str; 7] =
    ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

/// The directives that chat templates use, in UTC.
fn strftime(format: &str, seconds: u64) -> Result<String, Error> {
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil(days);
    let month_name = MONTHS[month - 1];
    let day_name = DAYS[(days as usize + 4) % 7];
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        match chars.next() {
            Some('Y') => out += &year.to_string(),
            Some('y') => out += &format!("{:02}", year % 100),
            Some('m') => out += &format!("{month:02}"),
            Some('d') => out += &format!("{day:02}"),
            Some('B') => out += month_name,
            Some('b') => out += &month_name[..3],
            Some('A') => out += day_name,
            Some('a') => out += &day_name[..3],
            Some('H') => out += &format!("{:02}", second / 3600),
            Some('M') => out += &format!("{:02}", second / 60 % 60),
            Some('S') => out += &format!("{:02}", second % 60),
            Some('%') => out.push('%'),
            other => {
                let directive = other.map_or_else(String::new, String::from);
                return Err(Error::new(
                    ErrorKind::InvalidOperation,
                    format!("strftime_now: `%{directive}` is not supported"),
                ));
            }
        }
    }
    Ok(out)
}

/// Year, month (from 1) and day of a day counted from 1970-01-01, by counting
/// from a 1 March, so that the leap day comes last (Hinnant).
fn civil(days: u64) -> (u64, usize, u64) {
    let days = days + 719_468;
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month as usize, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(template: &str) -> Result<String, RuntimeError> {
        let config = serde_json::json!({
            "chat_template": template, "bos_token": "<s>", "eos_token": { "content": "</s>" },
        });
        let messages =
            [Message { role: "system".into(), content: " Be brief. ".into() }, Message::user("Hi")];
        ChatTemplate::parse(config.to_string().as_bytes(), None)?.render(&messages)
    }

    #[test]
    fn a_template_sees_messages_tokens_and_python_methods() {
        let rendered = render(
            "{{ bos_token }}{%- for m in messages %}\n[{{ m['role'].upper() }}] {{ m.content.strip() }}{{ eos_token }}\n{%- endfor %}\n{% if add_generation_prompt %}\n[ASSISTANT]{% endif %}",
        );
        assert_eq!(rendered.unwrap(), "<s>[SYSTEM] Be brief.</s>[USER] Hi</s>[ASSISTANT]");
    }

    #[test]
    fn generation_blocks_render_their_content_and_keep_whitespace_control() {
        for (template, expected) in [
            ("a {% generation %}b{% endgeneration %} c", "a b c"),
            ("a {%- generation -%} b {%- endgeneration -%} c", "abc"),
            ("{%generation%}x{%endgeneration%}", "x"),
        ] {
            assert_eq!(render(template).unwrap(), expected, "{template}");
        }
    }

    #[test]
    fn a_template_can_refuse() {
        let error = render("{{ raise_exception('roles must alternate') }}").unwrap_err();
        assert_eq!(error.to_string(), "chat template: roles must alternate (line 1)");
    }

    #[test]
    fn the_default_of_a_list_is_taken_and_a_file_counts_first() {
        let config = br#"{"chat_template": [
            {"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]}"#;
        let rendered = |jinja| ChatTemplate::parse(config, jinja).unwrap().render(&[]).unwrap();
        assert_eq!(rendered(None), "plain");
        assert_eq!(rendered(Some(b"file")), "file");
    }

    #[test]
    fn no_template_and_a_broken_one_are_errors() {
        let error = ChatTemplate::parse(b"{}", None).unwrap_err();
        assert!(matches!(error, RuntimeError::NoChatTemplate));
        assert!(matches!(render("{% for %}"), Err(RuntimeError::ChatTemplate(_))));
    }

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (seconds, expected) in [
            (0, "Thursday 01 Jan 1970"),
            (951_782_400, "Tuesday 29 Feb 2000"),
            (1_735_603_200, "Tuesday 31 Dec 2024"),
            (4_107_542_400, "Monday 01 Mar 2100"),
        ] {
            assert_eq!(strftime("%A %d %b %Y", seconds).unwrap(), expected);
        }
        assert_eq!(strftime("%y-%m %H:%M:%S %%", 3_661).unwrap(), "70-01 01:01:01 %");
        assert!(strftime("%Q", 0).is_err());
    }
}
