//! `cargo xtask int8-experiment DIR`: trains, quantises, packs and compares
//! models, and writes `docs/experiments/int8.md` and its picture.

mod chart;
mod text;

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::Failure;
use crate::command::root;

const PAGE: &str = "docs/experiments/int8.md";
const PICTURE: &str = "docs/experiments/int8.svg";
/// Greedy tokens after each prompt.
const MAX_TOKENS: usize = 200;
/// Tokens after which divergence has just begun.
const EARLY: usize = 20;
/// Tokens of a window the perplexity is measured in: the sequences of the training, beyond which small models know little.
const WINDOW: usize = 256;
/// Models that are trained unless they are there: name, configuration, weights.
const TRAININGS: [(&str, &str, &[&str]); 5] = [
    (DEMO, "models/demo.json", &["--weights", "bf16"]),
    ("int8-tensor", "models/demo.json", &["--weights", "int8", "--granularity", "tensor"]),
    ("int8-channel", "models/demo.json", &["--weights", "int8", "--granularity", "channel"]),
    (
        "int8-rate",
        "models/demo.json",
        &["--weights", "int8", "--granularity", "channel", "--rate", RATE],
    ),
    (LARGER, "models/larger.json", &["--weights", "bf16"]),
];
/// Names of the BF16 models.
const DEMO: &str = "bf16";
const LARGER: &str = "larger-bf16";
/// Label of the models that everything is measured by.
const BF16: &str = "BF16";
/// Weight of the entropy in the loss.
const RATE: &str = "0.004";

/// Lines of the table: a checkpoint, and what it is judged against.
struct Row {
    label: &'static str,
    checkpoint: PathBuf,
    packed: PathBuf,
    made_from: Option<MadeFrom>,
}

/// A BF16 model, and the options it was quantised with.
struct MadeFrom {
    bf16: PathBuf,
    options: Vec<String>,
}

/// What was measured of a row.
struct Figures {
    label: &'static str,
    perplexity: f64,
    /// Of the linear layers but the head, packed, and of the whole packed files.
    linear_bits: f64,
    file_bits: f64,
    /// Packed against the checkpoint itself; `None` of one that is not packed.
    own: Option<Divergence>,
    against_bf16: Option<Divergence>,
}

/// How two models part over all prompts.
struct Divergence {
    identical: bool,
    /// First different token of each prompt, `None` if all are the same.
    first: Vec<Option<usize>>,
    /// Mean KL in nats at each position, both given the base's tokens.
    kl: Vec<f64>,
    perplexity_base: Option<f64>,
    perplexity_other: Option<f64>,
}

/// Runs everything that is missing in `folder`, and writes page and picture.
pub fn run(folder: &str, device: &str) -> Result<(), Failure> {
    let folder = Path::new(folder);
    let transom = build(device)?;
    fs::create_dir_all(folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    let files = text::write(folder)?;
    for training in &TRAININGS {
        train(&transom, folder, device, training)?;
    }
    let mut groups = Vec::new();
    for (title, rows) in [("Demo model", demo_rows(folder)), ("Larger model", larger_rows(folder))]
    {
        let mut figures = Vec::new();
        for row in rows {
            make(&transom, &row)?;
            figures.extend(measure(&transom, &row, &files)?);
        }
        groups.push((title, figures));
    }
    write(PICTURE, &chart::picture(&groups[0].1))?;
    write(PAGE, &page(&groups))
}

/// A model that was trained as it is.
fn trained(folder: &Path, label: &'static str, name: &str) -> Row {
    let at = folder.join(name);
    Row { label, checkpoint: at.join("checkpoint"), packed: at.join("packed"), made_from: None }
}

/// A BF16 model that is quantised in the way that `how` says.
fn quantised(folder: &Path, label: &'static str, base: &str, how: &str) -> Row {
    let at = folder.join(format!("{base}+{how}"));
    let options = match how {
        "tensor" | "channel" => ["--granularity", how].map(str::to_owned).to_vec(),
        bits => {
            let calibration = display(&folder.join(text::CALIBRATION));
            ["--granularity", "channel", "--target-bits", bits, "--calibration", &calibration]
                .map(str::to_owned)
                .to_vec()
        }
    };
    let made_from = Some(MadeFrom { bf16: folder.join(base).join("checkpoint"), options });
    Row { label, checkpoint: at.join("checkpoint"), packed: at.join("packed"), made_from }
}

fn demo_rows(folder: &Path) -> Vec<Row> {
    vec![
        trained(folder, BF16, DEMO),
        quantised(folder, "INT8 post-hoc, per tensor", DEMO, "tensor"),
        quantised(folder, "INT8 post-hoc, per channel", DEMO, "channel"),
        quantised(folder, "rate-aware, 6 bits", DEMO, "6"),
        quantised(folder, "rate-aware, 5 bits", DEMO, "5"),
        quantised(folder, "rate-aware, 4 bits", DEMO, "4"),
        trained(folder, "INT8-trained, per tensor", "int8-tensor"),
        trained(folder, "INT8-trained, per channel", "int8-channel"),
        trained(folder, "INT8-trained with the rate term", "int8-rate"),
    ]
}

fn larger_rows(folder: &Path) -> Vec<Row> {
    vec![
        trained(folder, BF16, LARGER),
        quantised(folder, "INT8 post-hoc, per tensor", LARGER, "tensor"),
        quantised(folder, "INT8 post-hoc, per channel", LARGER, "channel"),
    ]
}

/// The program, with training.
fn build(device: &str) -> Result<PathBuf, Failure> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let feature = if device == "cuda" { "train-cuda" } else { "train" };
    let args = ["build", "--release", "-p", "transom-cli", "--features", feature];
    let status = Command::new(cargo).args(args).status().map_err(|e| format!("cargo: {e}"))?;
    if !status.success() {
        return Err(format!("cargo {}: {status}", args.join(" ")));
    }
    let target = std::env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into());
    Ok(root().join(target).join("release/transom"))
}

fn train(
    transom: &Path,
    folder: &Path,
    device: &str,
    (name, config, weights): &(&str, &str, &[&str]),
) -> Result<(), Failure> {
    let out = folder.join(name);
    if out.join("checkpoint/config.json").exists() {
        return Ok(());
    }
    let mut args = vec!["train", text::CORPUS, "--config", config, "--device", device];
    args.extend(*weights);
    let mut args: Vec<String> = args.into_iter().map(str::to_owned).collect();
    args.extend(["--resume".to_owned(), "--out".to_owned(), display(&out)]);
    call(transom, &args).map(drop)
}

/// Quantises what is not trained as it is, and packs.
fn make(transom: &Path, row: &Row) -> Result<(), Failure> {
    if let Some(MadeFrom { bf16, options }) = &row.made_from
        && !row.checkpoint.exists()
    {
        let parent = row.checkpoint.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(parent).map_err(|e| format!("{}: {e}", parent.display()))?;
        let mut args = vec!["quantize".to_owned(), display(bf16), display(&row.checkpoint)];
        args.extend(options.iter().cloned());
        call(transom, &args)?;
    }
    if row.packed.exists() {
        return Ok(());
    }
    call(transom, &["pack".into(), display(&row.checkpoint), display(&row.packed)]).map(drop)
}

/// A line, or two: of the BF16 model as it is, too.
fn measure(transom: &Path, row: &Row, files: &text::Files) -> Result<Vec<Figures>, Failure> {
    println!("{}", row.checkpoint.display());
    let (linear_bits, file_bits) = sizes(transom, row)?;
    // The perplexity is measured once: packed weights give the same, as the logits show.
    let own = compare(transom, &row.checkpoint, &row.packed, files, row.made_from.is_none())?;
    let against_bf16 = (row.made_from.as_ref())
        .map(|made_from| compare(transom, &made_from.bf16, &row.checkpoint, files, true))
        .transpose()?;
    let mut figures = Vec::new();
    let mut label = row.label;
    if label == BF16 {
        figures.push(Figures {
            label,
            perplexity: own.perplexity_base.ok_or("compare: no perplexity")?,
            linear_bits: 16.0,
            file_bits: 16.0,
            own: None,
            against_bf16: None,
        });
        label = "lossless packed";
    }
    let measured = against_bf16.as_ref().unwrap_or(&own).perplexity_other;
    let perplexity = measured.ok_or("compare: no perplexity")?;
    figures.push(Figures {
        label,
        perplexity,
        linear_bits,
        file_bits,
        own: Some(own),
        against_bf16,
    });
    Ok(figures)
}

/// Bits a weight: of the linear layers but the head, and of all packed files.
fn sizes(transom: &Path, row: &Row) -> Result<(f64, f64), Failure> {
    let report = call_json(transom, &["inspect".into(), display(&row.packed), "--json".into()])?;
    let tensors = report["tensors"].as_array().ok_or("inspect: no tensors")?;
    let (mut bytes, mut weights) = (0.0, 0.0);
    for tensor in tensors {
        let name = tensor["name"].as_str().unwrap_or_default();
        // Scales belong to the weights that they scale.
        if name.contains("_proj.weight") {
            bytes += number(&tensor["packed_bytes"])?;
            if !name.ends_with("_scale") {
                weights += number(&tensor["weights"])?;
            }
        }
    }
    let all: f64 = {
        let mut sum = 0.0;
        for tensor in tensors {
            let name = tensor["name"].as_str().unwrap_or_default();
            sum += if name.ends_with("_scale") { 0.0 } else { number(&tensor["weights"])? };
        }
        sum
    };
    Ok((8.0 * bytes / weights, 8.0 * number(&report["packed_bytes"])? / all))
}

fn compare(
    transom: &Path,
    base: &Path,
    other: &Path,
    files: &text::Files,
    with_perplexity: bool,
) -> Result<Divergence, Failure> {
    let mut args = vec![
        "compare".to_owned(),
        display(base),
        display(other),
        "--prompts".to_owned(),
        display(&files.prompts),
        "--max-tokens".to_owned(),
        MAX_TOKENS.to_string(),
        "--json".to_owned(),
    ];
    if with_perplexity {
        args.extend(["--text".to_owned(), display(&files.validation)]);
        args.extend(["--window".to_owned(), WINDOW.to_string()]);
    }
    // Kept beside what was compared, as it takes minutes, for the same arguments and texts.
    let kept = other.with_extension("json");
    let asked = json!({ "arguments": args, "texts": files.sizes()? });
    let before = fs::read(&kept).ok().and_then(|kept| serde_json::from_slice::<Value>(&kept).ok());
    let report = match before {
        Some(before) if before["asked"] == asked => before["report"].clone(),
        _ => {
            let report = call_json(transom, &args)?;
            let both = json!({ "asked": asked, "report": report }).to_string();
            fs::write(&kept, both).map_err(|e| format!("{}: {e}", kept.display()))?;
            report
        }
    };
    let prompts = report["prompts"].as_array().ok_or("compare: no prompts")?;
    let mut kl = vec![0.0; MAX_TOKENS];
    let mut n = vec![0_usize; MAX_TOKENS];
    for prompt in prompts {
        for (at, value) in prompt["kl"].as_array().into_iter().flatten().enumerate() {
            kl[at] += number(value)?;
            n[at] += 1;
        }
    }
    for (sum, n) in kl.iter_mut().zip(&n) {
        *sum /= (*n).max(1) as f64;
    }
    let first = prompts.iter().map(|p| p["first_divergence"].as_u64().map(|at| at as usize));
    Ok(Divergence {
        identical: report["identical"].as_bool() == Some(true),
        first: first.collect(),
        kl,
        perplexity_base: report["perplexity_base"].as_f64(),
        perplexity_other: report["perplexity_other"].as_f64(),
    })
}

impl Divergence {
    /// The token before which half of the prompts have parted, `None` if they have not.
    fn median(&self) -> Option<usize> {
        let mut first = self.first.clone();
        first.sort_by_key(|at| at.unwrap_or(usize::MAX));
        first.get(first.len() / 2).copied().flatten()
    }

    fn parted(&self) -> usize {
        self.first.iter().flatten().count()
    }

    fn parted_before(&self, position: usize) -> usize {
        self.first.iter().flatten().filter(|&&at| at < position).count()
    }

    /// Mean KL of the first and the last twenty tokens.
    fn ends(&self) -> (f64, f64) {
        let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len().max(1) as f64;
        (mean(&self.kl[..20]), mean(&self.kl[self.kl.len() - 20..]))
    }
}

fn page(groups: &[(&str, Vec<Figures>)]) -> String {
    let mut page = String::from(
        "# INT8: quantised afterwards, or trained for it\n\nWritten by `cargo xtask int8-experiment`; \
         do not edit.\n\nPerplexity is that of held-out novels in windows of 256 tokens, as in the training. Bits a weight are those of the packed \
         linear layers (but the head), their scales included, and of all packed files. \"Own run\" \
         compares the packed checkpoint with the same one, not packed, over 100 prompts of held-out \
         text and 200 greedy tokens each; \"BF16\" compares the checkpoint with the BF16 model it was \
         made from.\n",
    );
    for (title, figures) in groups {
        let _ = write!(
            page,
            "\n## {title}\n\n| weights | perplexity | bits a weight | FP16 / packed | whole files | own run | \
             BF16: prompts that part, median first token | KL, first 20 tokens | last 20 |\n\
             |---|---|---|---|---|---|---|---|---|\n"
        );
        for figures in figures {
            page += &line(figures);
        }
    }
    page += "\n![KL divergence and diverged prompts along the sequence](int8.svg)\n\n## Claims\n\n";
    for (claim, holds, evidence) in claims(&groups[0].1) {
        let verdict = if holds { "holds" } else { "**does not hold**" };
        let _ = writeln!(page, "- {claim}: {verdict} ({evidence}).");
    }
    page
}

fn line(figures: &Figures) -> String {
    let own = match &figures.own {
        None => String::new(),
        Some(own) if own.identical => "identical".to_owned(),
        Some(own) => format!("{} prompts part", own.parted()),
    };
    let bf16 = figures.against_bf16.as_ref().map_or_else(
        || " | | ".to_owned(),
        |d| {
            let median = d.median().map_or_else(|| "none".to_owned(), |at| at.to_string());
            let (start, end) = d.ends();
            format!("{} of {}, {median} | {start:.2e} | {end:.2e}", d.parted(), d.first.len())
        },
    );
    format!(
        "| {} | {:.3} | {:.3} | {:.2} | {:.3} | {own} | {bf16} |\n",
        figures.label,
        figures.perplexity,
        figures.linear_bits,
        16.0 / figures.linear_bits,
        figures.file_bits,
    )
}

/// What is said of INT8, whether these figures show it, and which.
fn claims(figures: &[Figures]) -> Vec<(&'static str, bool, String)> {
    let find = |label: &str| figures.iter().find(|f| f.label == label);
    let mut claims = vec![(
        "packed models never part from their own uncompressed run, nor does a logit",
        figures.iter().filter_map(|f| f.own.as_ref()).all(|own| own.identical),
        format!("{} checkpoints", figures.iter().filter(|f| f.own.is_some()).count()),
    )];
    let post_hoc: Vec<&Figures> = figures.iter().filter(|f| f.against_bf16.is_some()).collect();
    let divergences = || post_hoc.iter().filter_map(|f| f.against_bf16.as_ref());
    claims.push((
        "INT8 made afterwards parts from BF16",
        divergences().all(|d| d.parted() > 0),
        list(divergences().map(|d| format!("{} of {}", d.parted(), d.first.len()))),
    ));
    claims.push((
        "and the divergence grows along the sequence: more prompts have parted after 200 tokens than after 20",
        divergences().all(|d| d.parted() > d.parted_before(EARLY)),
        list(divergences().map(|d| {
            format!("{} and {} of {}", d.parted_before(EARLY), d.parted(), d.first.len())
        })),
    ));
    claims.push((
        "given the same text, the logits too differ more at the end: KL of the last twenty tokens above that of the first",
        divergences().all(|d| d.ends().1 > d.ends().0),
        list(divergences().map(|d| format!("x {:.2}", d.ends().1 / d.ends().0))),
    ));
    if let (Some(bf16), Some(tensor), Some(channel), Some(rate)) = (
        find(BF16),
        find("INT8-trained, per tensor"),
        find("INT8-trained, per channel"),
        find("INT8-trained with the rate term"),
    ) {
        let more = |f: &Figures| 100.0 * (f.perplexity / bf16.perplexity - 1.0);
        claims.push((
            "INT8-trained perplexity is within 1 % of BF16-trained",
            more(tensor) <= 1.0 && more(channel) <= 1.0,
            format!("per tensor {:+.2} %, per channel {:+.2} %", more(tensor), more(channel)),
        ));
        claims.push((
            "with the rate term at most 5 bits a weight, within 2 %",
            rate.linear_bits <= 5.0 && more(rate) <= 2.0,
            format!("{:.2} bits, {:+.2} %", rate.linear_bits, more(rate)),
        ));
    }
    claims
}

fn list(items: impl Iterator<Item = String>) -> String {
    items.collect::<Vec<_>>().join(", ")
}

fn number(value: &Value) -> Result<f64, Failure> {
    value.as_f64().ok_or_else(|| format!("`{value}` is no number"))
}

fn display(path: &Path) -> String {
    path.display().to_string()
}

fn write(path: &str, content: &str) -> Result<(), Failure> {
    let path = root().join(path);
    fs::write(&path, content).map_err(|e| format!("{}: {e}", path.display()))
}

/// Runs the program; exit code 1 (data differ) is a result too.
fn call(transom: &Path, args: &[String]) -> Result<Vec<u8>, Failure> {
    let output = Command::new(transom).args(args).stderr(std::process::Stdio::inherit()).output();
    let output = output.map_err(|e| format!("{}: {e}", transom.display()))?;
    match output.status.code() {
        Some(0 | 1) => Ok(output.stdout),
        _ => Err(format!("transom {}: {}", args.join(" "), output.status)),
    }
}

fn call_json(transom: &Path, args: &[String]) -> Result<Value, Failure> {
    serde_json::from_slice(&call(transom, args)?)
        .map_err(|e| format!("transom {}: {e}", args.join(" ")))
}
