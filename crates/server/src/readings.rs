//! Prompts read for numbers: the async side of the engine's readings.

use std::sync::Arc;

use qwenkit_engine::{Canceller, Event, Priority, Reading};
use tokio::sync::mpsc::unbounded_channel;

use crate::{
    error::{ApiError, from_engine},
    models::ServedModel,
    tally::tally,
};

/// What prompts gave.
pub(crate) struct Values {
    /// One list for each reading, in their order.
    pub(crate) values: Vec<Vec<f32>>,
    pub(crate) prompt_tokens: usize,
}

/// Makes readings off the threads that serve connections, and waits for their values. A caller who goes away ends them.
///
/// # Errors
/// When one of them is refused; the others end then. `prompt` is the parameter that holds them.
pub(crate) async fn read(
    model: &Arc<ServedModel>,
    prompt: &'static str,
    priority: Priority,
    make: impl FnOnce(&ServedModel) -> Result<Vec<Reading>, ApiError> + Send + 'static,
) -> Result<Values, ApiError> {
    let (sender, mut events) = unbounded_channel();
    let model = Arc::clone(model);
    tally().asks(&model.name);
    let started = tokio::task::spawn_blocking(move || {
        let readings = make(&model)?;
        let prompt_tokens = readings.iter().map(|reading| reading.ids.len()).sum();
        let mut running = Running(Vec::new());
        for (i, reading) in readings.into_iter().enumerate() {
            let sender = sender.clone();
            let listener = Box::new(move |_, event| sender.send((i, event)).is_ok());
            let started = model.session.start_reading(reading, model.adapter.clone(), priority, listener);
            running.0.push(started.map_err(|error| from_engine(&error, prompt))?);
        }
        Ok::<_, ApiError>((running, prompt_tokens))
    });
    let (running, prompt_tokens) =
        started.await.map_err(|_| ApiError::internal("the request's preparation failed"))??;
    tally().read(prompt_tokens, 0);
    let mut values = vec![Vec::new(); running.0.len()];
    let mut left = values.len();
    while left > 0 {
        match events.recv().await {
            Some((i, Event::Values(found))) => values[i] = found,
            Some((_, Event::Finished(_))) => left -= 1,
            Some((_, Event::GivenUp(reason))) => return Err(ApiError::unavailable(reason)),
            Some(_) => {}
            None => return Err(ApiError::internal("the engine has stopped; the server's log says why")),
        }
    }
    Ok(Values { values, prompt_tokens })
}

/// Requests under way; they end with whoever waits for them.
struct Running(Vec<Canceller>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.iter().for_each(Canceller::cancel);
    }
}
