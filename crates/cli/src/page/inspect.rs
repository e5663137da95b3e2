//! The page of `inspect --html`.

use transom::Dtype;

use crate::command::inspect::{Report, Tensor};
use crate::html;
use crate::output::{bytes, grouped};
use crate::svg::{self, Columns, HeatMap, Stack};

/// Rows of a chart; more are merged with their neighbours.
const MAX_HEAT_ROWS: usize = 160;
const MAX_LAYER_ROWS: usize = 64;
/// Tensors with fewer weights say nothing about a distribution.
const MIN_HEAT_WEIGHTS: u64 = 1024;
/// Share of the weights that a chart may leave out at either end.
const CUT_SHARE: f64 = 5e-5;

/// The whole page.
pub(crate) fn page(report: &Report) -> String {
    let title = report.path.file_name().map_or_else(
        || report.path.display().to_string(),
        |name| name.to_string_lossy().into_owned(),
    );
    let state = if report.packed { "packed by transom" } else { "not packed" };
    let n_tensors = grouped(report.tensors.len() as u64);
    let subtitle = format!("{n_tensors} tensors, {} weights, {state}", grouped(report.weights));
    let mut body = totals(report);
    if let Some(dtype) = dominant_dtype(report) {
        body += &anatomy(report, dtype);
        body += &distributions(report);
        body += &heat_map(report, dtype);
    }
    body += &layers(report);
    body += &tensors(report);
    html::page(&title, &subtitle, &body)
}

fn totals(report: &Report) -> String {
    let floor_bytes = (report.entropy_bits * report.weights as f64 / 8.0) as u64;
    let saved = |n: u64| 100.0 * (1.0 - n as f64 / report.original_bytes.max(1) as f64);
    let mut cards = vec![("", bytes(report.original_bytes), "original".to_owned())];
    if let Some(packed_bytes) = report.packed_bytes {
        let label = format!("packed, {:.1} % less", saved(packed_bytes));
        cards.push(("good", bytes(packed_bytes), label));
    } else {
        let label = format!("at the entropy floor, {:.1} % less", saved(floor_bytes));
        cards.push(("good", bytes(floor_bytes), label));
    }
    cards.push(("", format!("{:.3}", report.bits_per_weight), "bits a weight".into()));
    cards.push(("", format!("{:.3}", report.entropy_bits), "bits at the entropy floor".into()));
    if report.packed {
        let over = report.bits_per_weight - report.entropy_bits;
        cards.push((
            "",
            format!("{over:+.3}"),
            "bits over the floor, tables and checks included".into(),
        ));
    }
    html::cards(&cards)
}

/// The type that most weights have, of those that can be coded.
fn dominant_dtype(report: &Report) -> Option<Dtype> {
    let weights = |dtype: Dtype| -> u64 { of_dtype(report, dtype).map(|t| t.weights).sum() };
    Dtype::ALL
        .into_iter()
        .filter(|&dtype| dtype.is_codable(0) && weights(dtype) > 0)
        .max_by_key(|&dtype| weights(dtype))
}

fn of_dtype(report: &Report, dtype: Dtype) -> impl Iterator<Item = &Tensor> {
    report.tensors.iter().filter(move |t| Dtype::from_safetensors(&t.dtype) == dtype)
}

fn sum<'a>(tensors: impl Iterator<Item = &'a Tensor>) -> [u64; 256] {
    let mut sum = [0; 256];
    for tensor in tensors {
        sum.iter_mut().zip(&tensor.histogram).for_each(|(a, b)| *a += b);
    }
    sum
}

fn entropy(histogram: &[u64; 256]) -> f64 {
    transom::model::Histogram { counts: *histogram }.entropy()
}

/// How the bits of one weight divide up, before and after.
fn anatomy(report: &Report, dtype: Dtype) -> String {
    let weights: u64 = of_dtype(report, dtype).map(|t| t.weights).sum();
    let floor: f64 =
        of_dtype(report, dtype).map(|t| t.entropy_bits * t.weights as f64).sum::<f64>()
            / weights.max(1) as f64;
    let total = 8.0 * dtype.elem_bytes() as f64;
    let parts = |coded: f64, raw: f64| match dtype {
        Dtype::Bf16 => vec![
            ("coded", coded, format!("exponent: {coded:.2} bits")),
            ("raw", 7.0, "mantissa: 7 bits".into()),
            ("sign", 1.0, "sign: 1 bit".into()),
        ],
        _ if raw > 0.0 => vec![
            ("coded", coded, format!("high byte: {coded:.2} bits")),
            ("raw", raw, format!("low byte: {raw:.2} bits")),
        ],
        _ => vec![("coded", coded, format!("value: {coded:.2} bits"))],
    };
    let raw = total - 8.0;
    // The low byte of FP16 may be coded as well.
    let raw_after = raw.min(floor);
    let rows = [
        Stack {
            name: "as it was".into(),
            parts: parts(8.0, raw),
            note: format!("{total:.0} bits"),
        },
        Stack {
            name: "information".into(),
            parts: parts(floor - raw_after, raw_after),
            note: format!("{floor:.2} bits"),
        },
    ];
    let words: &[(&str, &str)] = match dtype {
        Dtype::Bf16 => &[("coded", "exponent"), ("raw", "mantissa"), ("sign", "sign")],
        Dtype::F16 => &[("coded", "high byte"), ("raw", "low byte")],
        _ => &[("coded", "value")],
    };
    html::section(
        &format!("One {} weight", dtype.name()),
        "How many bits each part of a weight takes, and how much information is in them. What \
         looks random is kept as it is; the rest is entropy-coded. Nothing is rounded.",
        &(svg::stacks("bits of a weight", &rows) + &html::key(words)),
    )
}

/// The symbols that occur, without a negligible part at either end.
fn bulk(histogram: &[u64; 256], order: &[usize]) -> (usize, usize) {
    let total: u64 = histogram.iter().sum();
    let skip = |symbols: &mut dyn Iterator<Item = &usize>| {
        let mut left_out = 0.0;
        symbols
            .take_while(|&&symbol| {
                left_out += histogram[symbol] as f64 / total.max(1) as f64;
                left_out <= CUT_SHARE
            })
            .count()
    };
    let (low, high) = (skip(&mut order.iter()), skip(&mut order.iter().rev()));
    (low.min(255), (256 - high).max(low + 1).min(256))
}

/// Symbols of a type's first plane in the order of the x axis.
fn axis_order(dtype: Dtype) -> Vec<usize> {
    match dtype {
        Dtype::I8 => (128..256).chain(0..128).collect(),
        _ => (0..256).collect(),
    }
}

/// What a symbol means, and its short form below the axis.
fn meaning(dtype: Dtype, symbol: usize) -> (String, Option<String>) {
    match dtype {
        Dtype::Bf16 => {
            let power = symbol as i32 - 127;
            let tick = (power % 4 == 0).then(|| format!("2{}", superscript(power)));
            (format!("exponent {symbol}: magnitudes from 2^{power}"), tick)
        }
        Dtype::I8 => {
            let value = symbol as u8 as i8;
            (format!("value {value}"), (value % 16 == 0).then(|| value.to_string()))
        }
        Dtype::U8 => {
            (format!("value {symbol}"), symbol.is_multiple_of(32).then(|| symbol.to_string()))
        }
        _ => (
            format!("byte {symbol:#04x}"),
            symbol.is_multiple_of(16).then(|| format!("{symbol:#04x}")),
        ),
    }
}

fn superscript(n: i32) -> String {
    const DIGITS: [char; 10] = ['⁰', '¹', '²', '³', '⁴', '⁵', '⁶', '⁷', '⁸', '⁹'];
    let sign = if n < 0 { "⁻" } else { "" };
    let digits = n.unsigned_abs().to_string();
    let digits = digits.bytes().map(|digit| DIGITS[usize::from(digit - b'0')]);
    sign.chars().chain(digits).collect()
}

fn x_label(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::Bf16 => "magnitude of the weight (power of two given by its exponent)",
        Dtype::F16 => "high byte: sign, exponent and two bits of the mantissa",
        Dtype::I8 | Dtype::U8 => "value",
        _ => "byte: sign, exponent, mantissa",
    }
}

/// A column chart for each type that can be coded.
fn distributions(report: &Report) -> String {
    let mut out = String::new();
    for dtype in Dtype::ALL.into_iter().filter(|dtype| dtype.is_codable(0)) {
        let histogram = sum(of_dtype(report, dtype));
        let total: u64 = histogram.iter().sum();
        if total == 0 {
            continue;
        }
        let order = axis_order(dtype);
        let (low, high) = bulk(&histogram, &order);
        let bars = (low..high)
            .map(|position| {
                let symbol = order[position];
                let share = histogram[symbol] as f64 / total as f64;
                let (words, _) = meaning(dtype, symbol);
                (position as i64, share, format!("{words}: {:.2} % of the weights", share * 100.0))
            })
            .collect();
        let tick = |position: i64| meaning(dtype, order[position as usize]).1;
        let chart = Columns { x_label: x_label(dtype), bars, tick: &tick }.render();
        let n_used = histogram.iter().filter(|&&count| count > 0).count();
        let explanation = format!(
            "Share of the {} weights. {n_used} of 256 symbols occur; together they carry {:.2} \
             bits of information in 8 bits of storage.",
            grouped(total),
            entropy(&histogram),
        );
        let title = match dtype {
            Dtype::Bf16 => "Exponents of the BF16 weights".into(),
            _ => format!("Symbols of the {} weights", dtype.name()),
        };
        out += &html::section(&title, &explanation, &chart);
    }
    out
}

/// Distribution by tensor, in the order of the file.
fn heat_map(report: &Report, dtype: Dtype) -> String {
    let tensors: Vec<&Tensor> =
        of_dtype(report, dtype).filter(|t| t.weights >= MIN_HEAT_WEIGHTS).collect();
    if tensors.len() < 2 {
        return String::new();
    }
    let order = axis_order(dtype);
    let (low, high) = bulk(&sum(tensors.iter().copied()), &order);
    let rows = tensors
        .chunks(tensors.len().div_ceil(MAX_HEAT_ROWS))
        .map(|group| {
            let histogram = sum(group.iter().copied());
            let total: u64 = histogram.iter().sum();
            let share = |&symbol: &usize| histogram[symbol] as f64 / total.max(1) as f64;
            (group[0].name.clone(), order[low..high].iter().map(share).collect())
        })
        .collect();
    let tick = |position: i64| meaning(dtype, order[position as usize]).1;
    let chart = HeatMap { x_label: x_label(dtype), rows, first: low as i64, tick: &tick }.render();
    html::section(
        "The same, tensor by tensor",
        "One row a tensor, in the order of the file; the darker, the more of its weights. Each \
         tensor gets a code of its own.",
        &chart,
    )
}

/// Sizes by layer.
fn layers(report: &Report) -> String {
    let mut groups: Vec<(String, u64, u64)> = Vec::new();
    let first = report.tensors.first().map_or("", |tensor| layer_of(&tensor.name));
    let all_one = report.tensors.iter().all(|tensor| layer_of(&tensor.name) == first);
    for tensor in &report.tensors {
        let name = if all_one { &tensor.name } else { layer_of(&tensor.name) };
        let floor_bytes = (tensor.entropy_bits * tensor.weights as f64 / 8.0) as u64;
        let stored = tensor.packed_bytes.unwrap_or(floor_bytes);
        match groups.iter_mut().find(|group| group.0 == name) {
            Some(group) => {
                group.1 += tensor.original_bytes;
                group.2 += stored;
            }
            None => groups.push((name.to_owned(), tensor.original_bytes, stored)),
        }
    }
    let rows: Vec<Stack> = groups
        .chunks(groups.len().div_ceil(MAX_LAYER_ROWS).max(1))
        .map(|group| {
            let original: u64 = group.iter().map(|g| g.1).sum();
            let stored: u64 = group.iter().map(|g| g.2).sum();
            let saved = original.saturating_sub(stored);
            let percent = 100.0 * stored as f64 / original.max(1) as f64;
            Stack {
                name: match group {
                    [one] => one.0.clone(),
                    many => format!("{} and {} more", many[0].0, many.len() - 1),
                },
                parts: vec![
                    ("coded", stored as f64, format!("{} B", grouped(stored))),
                    ("saved", saved as f64, format!("{} B saved", grouped(saved))),
                ],
                note: format!("{}, {percent:.1} %", bytes(stored)),
            }
        })
        .collect();
    let (word, explanation) = match report.packed {
        true => ("packed", "Bytes of each layer's tensors, packed and before."),
        false => ("entropy floor", "Bytes of each layer's tensors, and what they could take."),
    };
    let chart = svg::stacks("bytes by layer", &rows);
    let key = html::key(&[("coded", word), ("saved", "saved")]);
    html::section("Sizes by layer", explanation, &(chart + &key))
}

/// The name up to its first part with a number, or without its last part.
fn layer_of(name: &str) -> &str {
    let mut end = 0;
    for part in name.split('.') {
        let next = end + part.len();
        if part.bytes().any(|b| b.is_ascii_digit()) {
            return &name[..next];
        }
        end = next + 1;
    }
    name.rsplit_once('.').map_or(name, |(layer, _)| layer)
}

fn tensors(report: &Report) -> String {
    let rows = report.tensors.iter().map(|t| {
        vec![
            t.name.clone(),
            t.dtype.clone(),
            crate::command::inspect::shape(&t.shape),
            grouped(t.original_bytes),
            grouped(t.packed_bytes.unwrap_or(t.original_bytes)),
            format!("{:.3}", t.bits_per_weight),
            format!("{:.3}", t.entropy_bits),
            format!("{:+.3}", t.bits_per_weight - t.entropy_bits),
        ]
    });
    let stored = if report.packed { "packed" } else { "stored" };
    let heading =
        ["tensor", "dtype", "shape", "original", stored, "bits/weight", "floor", "over floor"];
    let table = html::table(&heading, rows);
    let n = grouped(report.tensors.len() as u64);
    html::section(
        "All tensors",
        "Sizes in bytes; the floor is the order-0 entropy of the coded planes plus the raw bits.",
        &format!("<details><summary>{n} tensors</summary>{table}</details>"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_found_in_names() {
        for (name, layer) in [
            ("model.layers.17.mlp.up_proj.weight", "model.layers.17"),
            ("decoder1.att.key.w", "decoder1"),
            ("lm_head.weight", "lm_head"),
            ("bias", "bias"),
            ("größe.x", "größe"),
        ] {
            assert_eq!(layer_of(name), layer);
        }
    }

    #[test]
    fn the_bulk_leaves_out_next_to_nothing() {
        let order: Vec<usize> = (0..256).collect();
        let mut histogram = [0; 256];
        assert_eq!(bulk(&histogram, &order).0, 255);
        histogram[0] = 1;
        histogram[100] = 500_000;
        histogram[120] = 500_000;
        assert_eq!(bulk(&histogram, &order), (100, 121));
        histogram[0] = 1000;
        assert_eq!(bulk(&histogram, &order), (0, 121));
    }
}
