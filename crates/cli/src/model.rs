//! Models as the commands load them.

use std::path::Path;

use transom::layout::Layout;
use transom_runtime::store::Residency;
use transom_runtime::{Model, StoreOptions};

use crate::args::LayoutName;
use crate::machine;
use crate::output::bytes;
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
pub(crate) fn load(path: &Path, options: StoreOptions, quiet: bool) -> anyhow::Result<Model> {
    let progress = Progress::count(quiet, "loading tensors", 0);
    let model = Model::load(path, options, &mut |state| {
        progress.set(state.n_tensors as u64, state.n_tensors_total as u64);
    });
    progress.finish();
    model.map_err(|error| name_model(error.into(), path))
}

/// The bound asked for; without one, everything if it fits what is available,
/// and otherwise most of that.
pub(crate) fn memory(
    path: &Path,
    layout: Layout,
    wanted: Option<u64>,
) -> anyhow::Result<Option<u64>> {
    if wanted.is_some() {
        return Ok(wanted);
    }
    let Some(available) = machine::available_bytes() else { return Ok(None) };
    let expected = Model::expected_bytes(path, layout);
    let expected = expected.map_err(|error| name_model(error.into(), path))?;
    let usable = available / 10 * 8;
    Ok((expected > usable).then_some(usable))
}

/// Whether the files of a checkpoint are larger than the memory that could
/// hold them.
pub(crate) fn exceeds_memory(path: &Path) -> anyhow::Result<bool> {
    let checkpoint = transom::checkpoint::Checkpoint::open(path)?;
    let stored: u64 = checkpoint.tensors().map(|tensor| tensor.stored_bytes).sum();
    Ok(machine::available_bytes().is_some_and(|available| stored > available))
}

/// A line that says which weights are where.
pub(crate) fn residency(model: &Model, layout: Layout, memory: Option<u64>) -> String {
    let (size, layout) = (bytes(model.weights_bytes() as u64), layout.name());
    match (model.residency(), memory) {
        (Some(Residency { n_resident, n_streamed, n_buffers, buffer_bytes }), Some(memory))
            if n_streamed > 0 =>
        {
            format!(
                "weights: {n_resident} of {} matrices in memory ({layout}), the others read from \
                 the file for every token through {n_buffers} {} of {}; {size} of the {} allowed",
                n_resident + n_streamed,
                if n_buffers == 1 { "buffer" } else { "buffers" },
                bytes(buffer_bytes as u64),
                bytes(memory),
            )
        }
        _ => format!("weights: all in memory, {size} ({layout})"),
    }
}

/// Says which model it is about, unless the error does.
fn name_model(error: anyhow::Error, path: &Path) -> anyhow::Error {
    let name = path.display().to_string();
    if error.to_string().contains(&name) { error } else { error.context(name) }
}
