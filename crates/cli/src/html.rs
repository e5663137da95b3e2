//! Pages: one file, no script, nothing fetched.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;

use anyhow::Context as _;

/// Colours of the charts and of the text, for light and for dark screens.
const STYLE: &str = "\
:root{color-scheme:light dark;--page:#fbfaf8;--card:#fff;--ink:#1d2127;--soft:#6a7380;\
--line:#e4e2dd;--coded:#0f766e;--raw:#c9c5bb;--saved:#efece6;--sign:#b45309;--bad:#b42318}\
@media(prefers-color-scheme:dark){:root{--page:#14171b;--card:#1b1f25;--ink:#e8e6e1;\
--soft:#98a1ad;--line:#2c323a;--coded:#2dd4bf;--raw:#59616c;--saved:#262b32;--sign:#f0a04b;\
--bad:#f97066}}\
*{box-sizing:border-box}\
body{margin:0;background:var(--page);color:var(--ink);\
font:16px/1.5 system-ui,-apple-system,'Segoe UI',Roboto,'Liberation Sans',sans-serif}\
main{max-width:1040px;margin:0 auto;padding:48px 24px 80px}\
h1{font-size:30px;line-height:1.2;letter-spacing:-.02em;margin:0 0 6px;overflow-wrap:anywhere}\
h2{font-size:19px;letter-spacing:-.01em;margin:0 0 4px}\
p{margin:0 0 14px;color:var(--soft);max-width:72ch}\
section{background:var(--card);border:1px solid var(--line);border-radius:12px;\
padding:22px 24px;margin-top:20px}\
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(170px,1fr));gap:12px;\
margin-top:26px}\
.card{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:14px 18px}\
.card b{display:block;font-size:26px;line-height:1.25;letter-spacing:-.02em;\
font-variant-numeric:tabular-nums;font-weight:650}\
.card span{color:var(--soft);font-size:13.5px}\
.good b{color:var(--coded)}.bad b{color:var(--bad)}\
svg{display:block;width:100%;height:auto;overflow:visible}\
svg text{font-size:12px;fill:var(--soft);font-variant-numeric:tabular-nums}\
svg .label{font-size:13px;fill:var(--ink)}\
.end{text-anchor:end}.middle{text-anchor:middle}\
.grid{stroke:var(--line)}.axis{stroke:var(--soft)}\
.coded{fill:var(--coded)}.raw{fill:var(--raw)}.saved{fill:var(--saved)}.sign{fill:var(--sign)}\
.differ{fill:var(--bad)}\
.series{fill:none;stroke:var(--coded);stroke-opacity:.45;stroke-width:1.2}\
.mean{fill:none;stroke:var(--sign);stroke-width:2.4}\
.key{display:flex;flex-wrap:wrap;gap:6px 18px;margin:10px 0 0;color:var(--soft);font-size:13.5px}\
.key i{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:6px}\
details{margin-top:8px}summary{cursor:pointer;color:var(--soft)}\
.wide{overflow-x:auto}\
table{border-collapse:collapse;width:100%;font-size:13.5px;margin-top:8px}\
th,td{padding:5px 10px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap;\
font-variant-numeric:tabular-nums}\
th:first-child,td:first-child{text-align:left}\
th{color:var(--soft);font-weight:600}\
.texts th{text-align:left}td.text{white-space:pre-wrap;text-align:left;vertical-align:top}\
footer{margin-top:28px;color:var(--soft);font-size:13px}";

/// Text as it may stand between tags and in attributes.
pub(crate) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '"' => out += "&quot;",
            // Not allowed in HTML, and nothing to see.
            c if c.is_control() && c != '\n' && c != '\t' => out.push('\u{FFFD}'),
            c => out.push(c),
        }
    }
    out
}

/// A whole page. `body` is markup.
pub(crate) fn page(title: &str, subtitle: &str, body: &str) -> String {
    let (title, subtitle) = (escape(title), escape(subtitle));
    let version = env!("CARGO_PKG_VERSION");
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>{title}</title>\n<style>{STYLE}</style>\n\
         <main>\n<h1>{title}</h1>\n<p>{subtitle}</p>\n{body}\
         <footer>transom {version}</footer>\n</main>\n</html>\n"
    )
}

/// Cards with a large number each. `class` is empty, `good` or `bad`.
pub(crate) fn cards(cards: &[(&str, String, String)]) -> String {
    let cards: String = cards
        .iter()
        .map(|(class, number, label)| {
            let (number, label) = (escape(number), escape(label));
            format!("<div class=\"card {class}\"><b>{number}</b><span>{label}</span></div>")
        })
        .collect();
    format!("<div class=\"cards\">{cards}</div>\n")
}

/// A titled part of the page. `content` is markup.
pub(crate) fn section(title: &str, explanation: &str, content: &str) -> String {
    let (title, explanation) = (escape(title), escape(explanation));
    format!("<section><h2>{title}</h2><p>{explanation}</p>{content}</section>\n")
}

/// What the colours of a chart mean: class names and words.
pub(crate) fn key(entries: &[(&str, &str)]) -> String {
    let entries: String = entries
        .iter()
        .map(|(class, word)| {
            format!("<span><i style=\"background:var(--{class})\"></i>{}</span>", escape(word))
        })
        .collect();
    format!("<div class=\"key\">{entries}</div>")
}

/// A table; the first column stands left, the others right.
pub(crate) fn table(heading: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let heading: String = heading.iter().map(|h| format!("<th>{}</th>", escape(h))).collect();
    let mut body = String::new();
    for row in rows {
        let cells: String = row.iter().map(|c| format!("<td>{}</td>", escape(c))).collect();
        body += &format!("<tr>{cells}</tr>\n");
    }
    format!("<div class=\"wide\"><table><tr>{heading}</tr>\n{body}</table></div>")
}

/// Writes a page.
pub(crate) fn write(path: &Path, page: &str) -> anyhow::Result<()> {
    let write = || File::create(path)?.write_all(page.as_bytes());
    write().with_context(|| path.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_in_a_name_becomes_markup_and_nothing_is_fetched() {
        let name = "</title><script src=\"http://x\">\u{0}";
        let body = section(name, name, &table(&[name], [vec![name.to_owned()]]));
        let page = page(name, name, &(body + &cards(&[("", name.into(), name.into())])));
        assert!(!page.contains("<script"));
        assert!(!page.contains("src=\"") && !page.contains("href=") && !page.contains("url("));
        assert!(!page.contains('\u{0}'));
    }
}
