//! Models as the commands load them.

use std::path::Path;

use transom::layout::Layout;
use transom_runtime::{LoadOptions, Model};

use crate::args::LayoutName;
use crate::progress::Progress;

/// The layout asked for, or the usual one: dense for an original, fixed for a
/// packed checkpoint.
pub(crate) fn layout(path: &Path, wanted: Option<LayoutName>) -> anyhow::Result<Layout> {
    if let Some(name) = wanted {
        return Ok(name.into());
    }
    let checkpoint = transom::checkpoint::Checkpoint::open(path)?;
    Ok(if checkpoint.is_packed() { Layout::Fixed } else { Layout::Dense })
}

/// Loads a model, with a progress bar.
pub(crate) fn load(path: &Path, layout: Layout, quiet: bool) -> anyhow::Result<Model> {
    let progress = Progress::count(quiet, "loading tensors", 0);
    let model = Model::load(path, LoadOptions::new(layout), &mut |state| {
        progress.set(state.n_tensors as u64, state.n_tensors_total as u64);
    });
    progress.finish();
    model.map_err(|error| name_model(error.into(), path))
}

/// Says which model it is about, unless the error does.
fn name_model(error: anyhow::Error, path: &Path) -> anyhow::Error {
    let name = path.display().to_string();
    if error.to_string().contains(&name) { error } else { error.context(name) }
}
