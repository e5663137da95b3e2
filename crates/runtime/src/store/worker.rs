//! A thread that reads matrices from the file.

use std::sync::Arc;
use std::thread::JoinHandle;

use super::state::Shared;

/// Stops the store however the thread ends, so that nobody waits for it in vain.
struct StopAtEnd(Arc<Shared>);

impl Drop for StopAtEnd {
    fn drop(&mut self) {
        self.0.stop();
    }
}

pub(super) fn spawn(shared: Arc<Shared>) -> std::io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name("transom-prefetch".to_owned()).spawn(move || {
        let shared = StopAtEnd(shared);
        while let Some((index, buffer)) = shared.0.next_job() {
            let result = shared.0.sources[index].read(buffer);
            shared.0.publish(index, result);
        }
    })
}
