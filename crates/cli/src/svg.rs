//! Charts as inline SVG. Colours are classes, which the page's style sheet
//! defines for light and dark screens.

use std::fmt::Write as _;

use crate::html::escape;
use crate::output::keep_end;

/// Width of every chart, in SVG units.
const WIDTH: f64 = 960.0;

/// Column chart: shares over whole numbers.
pub(crate) struct Columns<'a> {
    /// What the x axis shows.
    pub(crate) x_label: &'a str,
    /// Position, share in 0..=1, and what to say about it.
    pub(crate) bars: Vec<(i64, f64, String)>,
    /// Text at a position of the x axis.
    pub(crate) tick: &'a dyn Fn(i64) -> Option<String>,
}

impl Columns<'_> {
    /// The chart; y is the share in per cent.
    pub(crate) fn render(&self) -> String {
        let (left, top, bottom, height) = (56.0, 14.0, 50.0, 300.0);
        let first = self.bars.iter().map(|b| b.0).min().unwrap_or(0);
        let last = self.bars.iter().map(|b| b.0).max().unwrap_or(0);
        let slot = (WIDTH - left) / (last - first + 1) as f64;
        let plot = height - top - bottom;
        let max = self.bars.iter().map(|b| b.1).fold(0.0, f64::max);
        let ticks = ticks(max * 100.0);
        let y_max = ticks.last().copied().unwrap_or(1.0);
        let y = |percent: f64| top + plot * (1.0 - percent / y_max);
        let x = |position: i64| left + slot * (position - first) as f64;
        let mut svg = open(height, self.x_label);
        for tick in ticks {
            h_line(&mut svg, "grid", left, WIDTH, y(tick));
            text(&mut svg, "tick end", left - 8.0, y(tick) + 4.0, &format!("{tick} %"));
        }
        let width = (slot * 0.86).max(0.5);
        for (position, share, tip) in &self.bars {
            let (x, y) = (x(*position) + (slot - width) / 2.0, y(share * 100.0));
            let height = (top + plot - y).max(0.6);
            let _ = write!(
                svg,
                r#"<rect class="coded" x="{x:.1}" y="{y:.1}" width="{width:.1}" height="{height:.1}" rx="1.5"><title>{}</title></rect>"#,
                escape(tip)
            );
        }
        h_line(&mut svg, "axis", left, WIDTH, top + plot);
        for position in first..=last {
            if let Some(label) = (self.tick)(position) {
                text(&mut svg, "tick middle", x(position) + slot / 2.0, top + plot + 18.0, &label);
            }
        }
        let middle = (left + WIDTH) / 2.0;
        text(&mut svg, "label middle", middle, height - 8.0, self.x_label);
        svg + "</svg>"
    }
}

/// Rows of cells, the darker the larger.
pub(crate) struct HeatMap<'a> {
    /// What the x axis shows.
    pub(crate) x_label: &'a str,
    /// Name of a row and its shares, in 0..=1, at `first`, `first + 1`, ...
    pub(crate) rows: Vec<(String, Vec<f64>)>,
    /// Position of the first column.
    pub(crate) first: i64,
    /// Text at a position of the x axis.
    pub(crate) tick: &'a dyn Fn(i64) -> Option<String>,
}

/// Shades of a heat map.
const N_SHADES: usize = 16;

impl HeatMap<'_> {
    /// The chart. One path a shade, so that thousands of cells stay small.
    pub(crate) fn render(&self) -> String {
        let (left, top, bottom) = (176.0, 6.0, 48.0);
        let n_cols = self.rows.iter().map(|row| row.1.len()).max().unwrap_or(0).max(1);
        let row_height = (640.0 / self.rows.len().max(1) as f64).clamp(3.0, 18.0);
        let slot = (WIDTH - left) / n_cols as f64;
        let plot = row_height * self.rows.len() as f64;
        let height = top + plot + bottom;
        let max = self.rows.iter().flat_map(|row| &row.1).copied().fold(0.0, f64::max);
        let gap = (slot * 0.1).min(0.6);
        let mut shades = vec![String::new(); N_SHADES + 1];
        for (r, (_, shares)) in self.rows.iter().enumerate() {
            for (c, share) in shares.iter().enumerate() {
                // The root lets rare values be seen beside frequent ones.
                let shade = ((share / max.max(1e-9)).sqrt() * N_SHADES as f64).round() as usize;
                let (x, y) = (left + slot * c as f64, top + row_height * r as f64);
                let _ = write!(
                    shades[shade.min(N_SHADES)],
                    "M{x:.1} {y:.1}h{:.1}v{:.1}h-{:.1}z",
                    slot - gap,
                    row_height - 0.4,
                    slot - gap
                );
            }
        }
        let mut svg = open(height, self.x_label);
        for (shade, path) in shades.iter().enumerate().skip(1).filter(|(_, path)| !path.is_empty())
        {
            let opacity = shade as f64 / N_SHADES as f64;
            let _ = write!(svg, r#"<path class="coded" fill-opacity="{opacity:.3}" d="{path}"/>"#);
        }
        // As many names as fit without touching.
        let every = (13.0 / row_height).ceil().max(1.0) as usize;
        for (r, (name, _)) in self.rows.iter().enumerate().step_by(every) {
            let y = top + row_height * (r as f64 + 0.5) + 4.0;
            text(&mut svg, "tick end", left - 8.0, y, &keep_end(name, 26));
        }
        for c in 0..n_cols {
            if let Some(label) = (self.tick)(self.first + c as i64) {
                let x = left + slot * (c as f64 + 0.5);
                text(&mut svg, "tick middle", x, top + plot + 18.0, &label);
            }
        }
        text(&mut svg, "label middle", (left + WIDTH) / 2.0, height - 8.0, self.x_label);
        svg + "</svg>"
    }
}

/// A bar made of parts, under a name.
pub(crate) struct Stack {
    /// Name at the left.
    pub(crate) name: String,
    /// Class, length, and what to say about the part.
    pub(crate) parts: Vec<(&'static str, f64, String)>,
    /// Text behind the bar.
    pub(crate) note: String,
}

/// Horizontal bars, all to one scale.
pub(crate) fn stacks(title: &str, rows: &[Stack]) -> String {
    let (left, right, pitch) = (176.0, 150.0, 24.0);
    let length = |row: &Stack| row.parts.iter().map(|part| part.1).sum::<f64>();
    let max = rows.iter().map(length).fold(0.0, f64::max).max(f64::MIN_POSITIVE);
    let mut svg = open(pitch * rows.len() as f64 + 6.0, title);
    for (r, row) in rows.iter().enumerate() {
        let y = 3.0 + pitch * r as f64;
        text(&mut svg, "tick end", left - 8.0, y + 15.0, &keep_end(&row.name, 26));
        let mut x = left;
        for (class, value, tip) in &row.parts {
            let width = (WIDTH - left - right) * value / max;
            let _ = write!(
                svg,
                r#"<rect class="{class}" x="{x:.1}" y="{y:.1}" width="{width:.1}" height="{:.1}"><title>{}</title></rect>"#,
                pitch - 5.0,
                escape(tip)
            );
            x += width;
        }
        text(&mut svg, "tick", x + 8.0, y + 15.0, &row.note);
    }
    svg + "</svg>"
}

/// A line through points.
pub(crate) struct Line {
    /// Class: `series` or `mean`.
    pub(crate) class: &'static str,
    /// What to say about it.
    pub(crate) tip: String,
    /// x and y of each point; x is a count.
    pub(crate) points: Vec<(usize, f64)>,
}

impl Line {
    /// A line through values at 0, 1, 2, ...
    pub(crate) fn through(class: &'static str, tip: String, values: &[f64]) -> Self {
        Self { class, tip, points: values.iter().copied().enumerate().collect() }
    }
}

/// Line chart over counts from 0, y from 0.
pub(crate) fn lines(x_label: &str, y_label: &str, lines: &[Line]) -> String {
    let (left, top, bottom, height) = (76.0, 26.0, 48.0, 300.0);
    let plot = height - top - bottom;
    let points = || lines.iter().flat_map(|line| &line.points);
    let x_max = points().map(|point| point.0).max().unwrap_or(0).max(1) as f64;
    let ticks_y = ticks(points().map(|point| point.1).fold(0.0, f64::max));
    let y_max = ticks_y.last().copied().unwrap_or(1.0);
    let x = |at: f64| left + (WIDTH - left - 8.0) * at / x_max;
    let y = |value: f64| top + plot * (1.0 - value / y_max);
    let mut svg = open(height, y_label);
    text(&mut svg, "label", 0.0, 12.0, y_label);
    for tick in ticks_y {
        h_line(&mut svg, "grid", left, WIDTH, y(tick));
        text(&mut svg, "tick end", left - 8.0, y(tick) + 4.0, &number(tick));
    }
    h_line(&mut svg, "axis", left, WIDTH, top + plot);
    for line in lines {
        let mut path = String::new();
        for (i, (at, value)) in line.points.iter().enumerate() {
            let command = if i == 0 { 'M' } else { 'L' };
            let _ = write!(path, "{command}{:.1} {:.1}", x(*at as f64), y(*value));
        }
        let tip = escape(&line.tip);
        let class = line.class;
        let _ = write!(svg, r#"<path class="{class}" d="{path}"><title>{tip}</title></path>"#);
    }
    for tick in ticks(x_max).into_iter().filter(|t| *t <= x_max && *t == t.round()) {
        text(&mut svg, "tick middle", x(tick), top + plot + 18.0, &number(tick));
    }
    text(&mut svg, "label middle", (left + WIDTH) / 2.0, height - 8.0, x_label);
    svg + "</svg>"
}

fn open(height: f64, title: &str) -> String {
    format!(r#"<svg viewBox="0 0 {WIDTH} {height:.0}" role="img" aria-label="{}">"#, escape(title))
}

fn text(svg: &mut String, class: &str, x: f64, y: f64, text: &str) {
    let _ = write!(svg, r#"<text class="{class}" x="{x:.1}" y="{y:.1}">{}</text>"#, escape(text));
}

fn h_line(svg: &mut String, class: &str, x1: f64, x2: f64, y: f64) {
    let _ = write!(svg, r#"<line class="{class}" x1="{x1}" x2="{x2}" y1="{y:.1}" y2="{y:.1}"/>"#);
}

/// Four to nine round values from 0 to `max` or just above.
fn ticks(max: f64) -> Vec<f64> {
    if !max.is_finite() || max <= 0.0 {
        return vec![0.0, 1.0];
    }
    let magnitude = 10f64.powf((max / 4.0).log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0]
        .into_iter()
        .map(|factor| factor * magnitude)
        .find(|step| max / step <= 7.0)
        .unwrap_or(10.0 * magnitude);
    let n = (max / step).ceil() as usize;
    // The product of two short numbers need not be short.
    (0..=n).map(|i| (i as f64 * step * 1e9).round() / 1e9).map(|t| t + 0.0).collect()
}

fn number(value: f64) -> String {
    match value {
        0.0 => "0".into(),
        v if v.abs() < 1e-3 || v.abs() >= 1e5 => format!("{v:.0e}"),
        v => format!("{v}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_start_at_zero_and_reach_the_maximum() {
        for max in [1e-6, 0.3, 1.0, 7.0, 26.4, 99.9, 1e7] {
            let ticks = ticks(max);
            assert!((3..=10).contains(&ticks.len()), "{max}: {ticks:?}");
            assert!(ticks[0] == 0.0 && *ticks.last().unwrap() >= max, "{max}: {ticks:?}");
        }
        assert_eq!(ticks(0.0), [0.0, 1.0]);
        assert_eq!(ticks(f64::NAN), [0.0, 1.0]);
    }

    #[test]
    fn names_cannot_end_the_markup() {
        let row = Stack {
            name: "<b>&".into(),
            parts: vec![("coded", 1.0, "\"</svg>".into())],
            note: "<".into(),
        };
        let svg = stacks("\"><script>", &[row]);
        assert!(!svg.contains("<b>") && !svg.contains("<script>"));
        assert_eq!(svg.matches("</svg>").count(), 1);
    }

    #[test]
    fn charts_of_nothing_are_still_charts() {
        let none = |_: i64| None;
        let columns = Columns { x_label: "x", bars: vec![], tick: &none }.render();
        let map = HeatMap { x_label: "x", rows: vec![], first: 0, tick: &none }.render();
        for svg in [columns, map, stacks("x", &[]), lines("x", "y", &[])] {
            assert!(svg.ends_with("</svg>") && !svg.contains("NaN") && !svg.contains("inf"));
        }
    }
}
