//! The picture of `docs/experiments/int8.md`: how models part along the
//! sequence. A line of its own for each post-hoc checkpoint.

use std::fmt::Write as _;

use super::{Divergence, Figures, MAX_TOKENS};

const WIDTH: f64 = 760.0;
const PANEL: f64 = 260.0;
const LEFT: f64 = 64.0;
const TOP: f64 = 34.0;
const GAP: f64 = 70.0;
const LEGEND: f64 = 24.0;
const COLOURS: [&str; 6] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"];
/// Tokens a point of the KL curve is the mean of.
const BIN: usize = 10;

/// KL on a logarithmic scale above, the share of prompts that have parted below.
pub fn picture(figures: &[Figures]) -> String {
    let curves: Vec<(&str, &Divergence)> =
        figures.iter().filter_map(|f| Some((f.label, f.against_bf16.as_ref()?))).collect();
    let height = TOP + 2.0 * PANEL + GAP + 40.0 + LEGEND * curves.len() as f64;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"white\"/>\n"
    );
    let kls: Vec<Vec<f64>> = curves.iter().map(|(_, d)| binned(&d.kl)).collect();
    let positive = || kls.iter().flatten().copied().filter(|kl| *kl > 0.0);
    let low = positive().fold(1.0, f64::min).log10().floor();
    let high = positive().fold(1e-12, f64::max).log10().ceil().max(low + 1.0);
    frame(&mut svg, TOP, "KL(BF16 || INT8) of the next token, nats");
    for power in low as i32..=high as i32 {
        let y = TOP + PANEL * (high - f64::from(power)) / (high - low);
        tick(&mut svg, y, &format!("1e{power}"));
    }
    let second = TOP + PANEL + GAP;
    frame(&mut svg, second, "prompts whose text has parted, %");
    for percent in [0, 25, 50, 75, 100] {
        tick(&mut svg, second + PANEL * (1.0 - f64::from(percent) / 100.0), &percent.to_string());
    }
    for (index, ((label, divergence), kl)) in curves.iter().zip(&kls).enumerate() {
        let colour = COLOURS[index % COLOURS.len()];
        let points = kl.iter().enumerate().filter(|(_, kl)| **kl > 0.0).map(|(bin, kl)| {
            let at = (bin as f64 + 0.5) * BIN as f64;
            (x(at), TOP + PANEL * (high - kl.log10()) / (high - low))
        });
        line(&mut svg, points, colour);
        let n = divergence.first.len().max(1) as f64;
        let parted = (0..=MAX_TOKENS).map(|at| {
            let n_parted = divergence.first.iter().flatten().filter(|first| **first < at).count();
            (x(at as f64), second + PANEL * (1.0 - n_parted as f64 / n))
        });
        line(&mut svg, parted, colour);
        let y = second + PANEL + 48.0 + LEGEND * index as f64;
        let _ = writeln!(
            svg,
            "<rect x=\"{LEFT}\" y=\"{:.1}\" width=\"22\" height=\"4\" fill=\"{colour}\"/><text x=\"{:.1}\" y=\"{y:.1}\">{label}</text>",
            y - 6.0,
            LEFT + 30.0
        );
    }
    svg + "</svg>\n"
}

fn x(token: f64) -> f64 {
    LEFT + (WIDTH - LEFT - 16.0) * token / MAX_TOKENS as f64
}

fn binned(values: &[f64]) -> Vec<f64> {
    values.chunks(BIN).map(|bin| bin.iter().sum::<f64>() / bin.len() as f64).collect()
}

fn frame(svg: &mut String, top: f64, title: &str) {
    let bottom = top + PANEL;
    let _ = writeln!(
        svg,
        "<text x=\"{LEFT}\" y=\"{:.1}\" font-weight=\"bold\">{title}</text>",
        top - 10.0
    );
    for token in (0..=MAX_TOKENS).step_by(50) {
        let at = x(token as f64);
        let _ = writeln!(
            svg,
            "<line x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{top:.1}\" y2=\"{bottom:.1}\" stroke=\"#eee\"/>\
             <text x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{token}</text>",
            bottom + 18.0
        );
    }
}

fn tick(svg: &mut String, y: f64, label: &str) {
    let _ = writeln!(
        svg,
        "<line x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{y:.1}\" y2=\"{y:.1}\" stroke=\"#ddd\"/>\
         <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{label}</text>",
        WIDTH - 16.0,
        LEFT - 8.0,
        y + 4.0
    );
}

fn line(svg: &mut String, points: impl Iterator<Item = (f64, f64)>, colour: &str) {
    let points: Vec<String> = points.map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
    let _ = writeln!(
        svg,
        "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>",
        points.join(" ")
    );
}
