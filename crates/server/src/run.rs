//! Answers under way: one request's questions to a session, and their pieces as they come.

use std::{
    sync::Arc,
    task::{Context, Poll, ready},
    time::Instant,
};

use qwenkit_engine::{Ask, Event, Listener, Piece, Transcript};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use crate::{
    error::{ApiError, from_engine},
    images::Memory,
    models::ServedModel,
    tally::{Tally, tally},
};

/// What was told: pieces of one of the answers.
pub(crate) type Told = Result<(usize, Vec<Piece>), ApiError>;

/// The answers to one request. Dropping it cancels those that are not through.
pub(crate) struct Run {
    /// (answer, when, what)
    events: UnboundedReceiver<(usize, Instant, Event)>,
    transcripts: Vec<Transcript>,
    /// Answers that have not ended.
    left: usize,
    model: Arc<ServedModel>,
    /// Which of them have.
    ended: Vec<bool>,
    /// What the tokens are charged to.
    tally: Tally,
    /// What the images take, until the end.
    _memory: Memory,
}

/// What a request comes to.
pub(crate) struct Asked {
    pub(crate) asks: Vec<Ask>,
    /// What their images take.
    pub(crate) memory: Memory,
}

impl Run {
    /// Hands in questions, which are made and tokenised off the threads that serve connections. `prompt` is the parameter
    /// that holds their prompt.
    ///
    /// # Errors
    /// When one of them is refused; none runs then.
    pub(crate) async fn start(
        model: &Arc<ServedModel>,
        asks: impl FnOnce(&ServedModel) -> Result<Asked, ApiError> + Send + 'static,
        prompt: &'static str,
    ) -> Result<Run, ApiError> {
        let (model, tally) = (Arc::clone(model), tally());
        tally.asks(&model.name);
        let started = tokio::task::spawn_blocking(move || {
            let (sender, events) = unbounded_channel();
            let mut heard: Vec<(Ask, Listener)> = Vec::new();
            let Asked { asks, memory } = asks(&model)?;
            for (i, ask) in asks.into_iter().enumerate() {
                let sender = sender.clone();
                heard.push((ask, Box::new(move |time, event| sender.send((i, time, event)).is_ok())));
            }
            let transcripts = model.session.start(heard).map_err(|error| from_engine(&error, prompt))?;
            let left = transcripts.len();
            Ok(Run { events, transcripts, left, ended: vec![false; left], model, tally, _memory: memory })
        });
        started.await.map_err(|_| ApiError::internal("the request's preparation failed; the server's log says why"))?
    }

    /// The answers.
    pub(crate) fn transcripts(&self) -> &[Transcript] {
        &self.transcripts
    }

    /// The next pieces of one answer; `None` at the end of all.
    pub(crate) async fn next(&mut self) -> Option<Told> {
        std::future::poll_fn(|context| self.poll_next(context)).await
    }

    /// All pieces of all answers, to the end.
    ///
    /// # Errors
    /// When the engine stops in the middle.
    pub(crate) async fn drain(&mut self, mut take_in: impl FnMut(usize, Piece)) -> Result<(), ApiError> {
        while let Some(next) = self.next().await {
            let (i, pieces) = next?;
            pieces.into_iter().for_each(|piece| take_in(i, piece));
        }
        Ok(())
    }

    pub(crate) fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<Told>> {
        if self.left == 0 {
            return Poll::Ready(None);
        }
        let Some((i, time, event)) = ready!(self.events.poll_recv(context)) else {
            self.left = 0;
            let error =
                ApiError::internal("the engine has stopped in the middle of the answer; the server's log says why");
            return Poll::Ready(Some(Err(error)));
        };
        let pieces = match self.transcripts[i].push(time, event) {
            Ok(pieces) => pieces,
            Err(error) => {
                self.left = 0;
                return Poll::Ready(Some(Err(from_engine(&error, ""))));
            }
        };
        if let Some(Piece::Done(summary)) = pieces.last() {
            self.left -= 1;
            self.ended[i] = true;
            self.model.work.add(summary);
            self.tally.answered(summary);
        }
        Poll::Ready(Some(Ok((i, pieces))))
    }
}

impl Drop for Run {
    /// What was computed for answers that nobody waits for any more has been used all the same.
    fn drop(&mut self) {
        while let Ok((i, time, event)) = self.events.try_recv() {
            // An answer that is given up has used what it has.
            let _ = self.transcripts[i].push(time, event);
        }
        for (transcript, _) in self.transcripts.iter().zip(&self.ended).filter(|(_, ended)| !**ended) {
            let (read, generated) = transcript.tokens_so_far();
            self.tally.read(read, generated);
        }
    }
}
