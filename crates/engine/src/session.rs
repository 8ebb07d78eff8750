//! A session: a model with its text side and an engine; prompts in, pieces of text out.

use std::time::Instant;

use qwenkit_formats::ModelFiles;
use qwenkit_kernels::{Compute, Isa, PAGE_TOKENS};
use qwenkit_models::{Buffers, LoadEvent, Model, ModelState};
use qwenkit_tensor::TokenId;
use qwenkit_text::{ChatInput, ChatTemplate, SpecialTokens, StreamDecoder, Tokenizer, encode_chat};

use crate::{
    engine::{Canceller, Engine, Stream},
    error::Error,
    memory,
    model_text::{ModelText, text_of},
    random::Random,
    request::{Event, Finish, Goal, Request, TokenLogprobs},
    runner::ModelRunner,
    sampler::Sampling,
    scheduler::Scheduler,
    stop_text::StopText,
};

/// How a model is run.
#[derive(Clone, Debug)]
pub struct Options {
    /// Threads that compute.
    pub threads: usize,
    /// The instruction set; must be available.
    pub isa: Isa,
    /// Tokens of context; the model's own where absent, less if memory is short.
    pub context_tokens: Option<usize>,
}

/// A model ready to answer.
pub struct Session {
    engine: Engine,
    text: ModelText,
    info: Info,
    origin: String,
}

/// What a session runs.
#[derive(Clone, Debug)]
pub struct Info {
    /// The architecture, as `model_type` has it.
    pub architecture: &'static str,
    /// Layers.
    pub layers: usize,
    /// D
    pub width: usize,
    /// V
    pub vocab: usize,
    /// Elements of all tensors in the file.
    pub parameters: u64,
    /// Bytes of the weights in memory.
    pub weight_bytes: usize,
    /// Bytes of weights read for each generated token.
    pub bytes_per_token: usize,
    /// Tokens of context in force.
    pub context_tokens: usize,
    /// Tokens of context that the model was made for.
    pub model_context_tokens: usize,
    /// Bytes of cache for each token of context.
    pub kv_bytes_per_token: usize,
    /// The instruction set in use.
    pub isa: Isa,
    /// Threads in use.
    pub threads: usize,
    /// Whether the model has a chat template.
    pub has_template: bool,
}

/// A prompt.
#[derive(Clone, Debug)]
pub enum Prompt {
    /// A conversation, through the model's template; what people wrote cannot spell control tokens.
    Chat(ChatInput),
    /// Token ids as they are.
    Ids(Vec<TokenId>),
    /// Text as it is; control tokens that it spells are control tokens.
    Text(String),
}

/// A question to a session.
#[derive(Clone, Debug)]
pub struct Ask {
    /// The prompt.
    pub prompt: Prompt,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Tokens to generate at most; what the context holds where absent.
    pub max_tokens: Option<usize>,
    /// Texts that end the answer; they are not part of it.
    pub stop: Vec<String>,
    /// Log-probabilities wanted: of each token and of so many best ones.
    pub logprobs: Option<usize>,
    /// Goes on past the model's own end.
    pub ignore_stop_tokens: bool,
}

/// A part of an answer.
#[derive(Clone, Debug)]
pub enum Piece {
    /// Progress through the prompt.
    Prefill {
        /// Tokens done.
        done_tokens: usize,
        /// Tokens of the prompt.
        total_tokens: usize,
    },
    /// Some text; whole characters.
    Text(TextPiece),
    /// The end.
    Done(Summary),
}

/// Text that has become certain.
#[derive(Clone, Debug, Default)]
pub struct TextPiece {
    /// The text.
    pub text: String,
    /// Tokens generated since the last piece; their text may come later, or has come before.
    pub ids: Vec<TokenId>,
    /// Of those tokens, if wanted.
    pub logprobs: Vec<TokenLogprobs>,
}

/// A whole answer, in numbers.
#[derive(Clone, Debug)]
pub struct Summary {
    /// Generated tokens, the one that ended it included.
    pub ids: Vec<TokenId>,
    /// The answer.
    pub text: String,
    /// Why it ended.
    pub finish: Finish,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Of these, tokens whose state was still there from before.
    pub cached_tokens: usize,
    /// Milliseconds from the question to the first token.
    pub prompt_ms: f64,
    /// Milliseconds from the first token to the last.
    pub generate_ms: f64,
    /// The seed of its random numbers.
    pub seed: u64,
}

impl Session {
    /// Loads the model in `files` and starts its engine.
    ///
    /// # Errors
    /// When the files are no whole model with its tokenizer, or memory is short.
    pub fn open(files: &ModelFiles, options: &Options, progress: &mut dyn FnMut(LoadEvent)) -> Result<Session, Error> {
        memory::check_weights(files.size_bytes(), memory::available_memory_bytes())?;
        let text = text_of(files)?;
        let compute = Compute::new(options.threads, options.isa);
        let model = Model::load(files, &compute, progress)?;
        let (plan, kv_type) = (model.plan(), model.kv_type());
        let available = memory::available_memory_bytes();
        let context_tokens = memory::context_tokens(plan, kv_type, options.context_tokens, available)?;
        let pages = context_tokens.div_ceil(PAGE_TOKENS);
        let slots = memory::slots(plan);
        let state = ModelState::new(plan, kv_type, pages, slots)?;
        let info = Info {
            architecture: plan.architecture,
            layers: plan.layers.len(),
            width: plan.width,
            vocab: plan.vocab,
            parameters: files.tensors().iter().map(|t| t.shape.iter().product::<usize>() as u64).sum(),
            weight_bytes: model.weight_bytes(),
            bytes_per_token: model.bytes_per_token(),
            context_tokens,
            model_context_tokens: plan.context_tokens,
            kv_bytes_per_token: ModelState::page_bytes(plan, kv_type) / PAGE_TOKENS,
            isa: compute.isa(),
            threads: compute.pool().threads(),
            has_template: text.template.is_some(),
        };
        let runner = ModelRunner { model, compute, state, slots, buffers: Buffers::default() };
        let engine = Engine::start(Scheduler::new(runner, pages, text.tokenizer.vocab_size()))?;
        Ok(Session { engine, text, info, origin: files.path().display().to_string() })
    }

    /// What this session runs.
    pub fn info(&self) -> &Info {
        &self.info
    }

    /// The model's tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.text.tokenizer
    }

    /// The model's chat template.
    pub fn template(&self) -> Option<&ChatTemplate> {
        self.text.template.as_ref()
    }

    /// The sampling that the model's makers recommend.
    pub fn defaults(&self) -> &Sampling {
        &self.text.defaults
    }

    /// The tokens that end an answer.
    pub fn stop_tokens(&self) -> &[TokenId] {
        &self.text.stop_tokens
    }

    /// Asks; the answer comes piece by piece.
    ///
    /// # Errors
    /// When the prompt cannot be made, is longer than the context, or a setting is wrong.
    pub fn ask(&self, ask: Ask) -> Result<Answer, Error> {
        let prompt_ids = self.prompt_ids(&ask.prompt)?;
        let (prompt_tokens, context_tokens) = (prompt_ids.len(), self.info.context_tokens);
        if prompt_tokens >= context_tokens {
            let more = self.info.model_context_tokens > context_tokens;
            let hint = match more {
                true => format!(", or raise --ctx (the model takes up to {})", self.info.model_context_tokens),
                false => ", or take a model with a longer context".to_owned(),
            };
            return Err(Error::PromptTooLong { prompt_tokens, context_tokens, hint });
        }
        let seed = ask.sampling.seed.unwrap_or_else(Random::fresh_seed);
        let request = Request {
            prompt: prompt_ids.clone(),
            goal: Goal::Answer,
            sampling: Sampling { seed: Some(seed), ..ask.sampling },
            max_tokens: ask.max_tokens.unwrap_or(usize::MAX).min(context_tokens - prompt_tokens),
            stop_tokens: if ask.ignore_stop_tokens { Vec::new() } else { self.text.stop_tokens.clone() },
            logprobs: ask.logprobs,
        };
        let stop_tokens = request.stop_tokens.clone();
        let asked = Instant::now();
        Ok(Answer {
            stream: self.engine.submit(request)?,
            decoder: Some(StreamDecoder::new(&self.text.tokenizer, false)),
            stop_text: StopText::new(ask.stop),
            stop_tokens,
            summary: Summary {
                ids: Vec::new(),
                text: String::new(),
                finish: Finish::Cancelled,
                prompt_tokens,
                cached_tokens: 0,
                prompt_ms: 0.0,
                generate_ms: 0.0,
                seed,
            },
            prompt_ids,
            asked,
            stopped: false,
            ended: false,
            pending: None,
        })
    }

    fn prompt_ids(&self, prompt: &Prompt) -> Result<Vec<TokenId>, Error> {
        match prompt {
            Prompt::Ids(ids) => Ok(ids.clone()),
            Prompt::Text(text) => Ok(self.text.tokenizer.encode(text, SpecialTokens::Parse)?),
            Prompt::Chat(input) => match &self.text.template {
                Some(template) => Ok(encode_chat(template, &self.text.tokenizer, input)?),
                None => Err(Error::NoTemplate { origin: self.origin.clone() }),
            },
        }
    }
}

/// An answer on its way: an iterator of pieces, the last of which is `Done`. Dropping it cancels the request.
pub struct Answer {
    stream: Stream,
    /// Taken at the end.
    decoder: Option<StreamDecoder>,
    stop_text: StopText,
    stop_tokens: Vec<TokenId>,
    prompt_ids: Vec<TokenId>,
    summary: Summary,
    asked: Instant,
    /// A stop text has come.
    stopped: bool,
    ended: bool,
    /// The end, when its last text had to go first.
    pending: Option<Piece>,
}

impl Answer {
    /// A handle that ends the answer from anywhere.
    pub fn canceller(&self) -> Canceller {
        self.stream.canceller()
    }

    /// The prompt's tokens.
    pub fn prompt_ids(&self) -> &[TokenId] {
        &self.prompt_ids
    }

    fn token(&mut self, time: Instant, id: TokenId, logprobs: Option<TokenLogprobs>) -> Piece {
        let elapsed_ms = (time - self.asked).as_secs_f64() * 1e3;
        if self.summary.ids.is_empty() {
            self.summary.prompt_ms = elapsed_ms;
        }
        self.summary.generate_ms = elapsed_ms - self.summary.prompt_ms;
        self.summary.ids.push(id);
        let mut piece = TextPiece { text: String::new(), ids: vec![id], logprobs: Vec::from_iter(logprobs) };
        if !self.stop_tokens.contains(&id) {
            let text = self.decoder.as_mut().map(|d| d.push(id)).unwrap_or_default();
            let passed = self.stop_text.push(&text);
            if passed.stopped {
                self.stopped = true;
                self.stream.canceller().cancel();
            }
            piece.text = passed.text;
        }
        self.summary.text.push_str(&piece.text);
        Piece::Text(piece)
    }

    /// The end: what was held back comes out, if no stop text has cut it off.
    fn finished(&mut self, finish: Finish) -> Piece {
        self.ended = true;
        self.summary.finish = if self.stopped { Finish::Stop } else { finish };
        let mut rest = String::new();
        if let (false, Some(decoder)) = (self.stopped, self.decoder.take()) {
            let passed = self.stop_text.push(&decoder.finish());
            rest = passed.text;
            match passed.stopped {
                true => self.summary.finish = Finish::Stop,
                false => rest.push_str(&self.stop_text.finish()),
            }
        }
        self.summary.text.push_str(&rest);
        let done = Piece::Done(self.summary.clone());
        if rest.is_empty() {
            return done;
        }
        self.pending = Some(done);
        Piece::Text(TextPiece { text: rest, ..TextPiece::default() })
    }
}

impl Iterator for Answer {
    type Item = Result<Piece, Error>;

    fn next(&mut self) -> Option<Result<Piece, Error>> {
        if self.ended {
            return self.pending.take().map(Ok);
        }
        loop {
            match self.stream.recv() {
                Ok((_, Event::Prefill { done_tokens, total_tokens, cached_tokens })) => {
                    self.summary.cached_tokens = cached_tokens;
                    return Some(Ok(Piece::Prefill { done_tokens, total_tokens }));
                }
                // Tokens computed between a stop text and its cancellation belong to nobody.
                Ok((_, Event::Token { .. })) if self.stopped => {}
                // Only other goals than an answer have values.
                Ok((_, Event::Values(_))) => {}
                Ok((time, Event::Token { id, logprobs })) => return Some(Ok(self.token(time, id, logprobs))),
                Ok((_, Event::Finished(finish))) => return Some(Ok(self.finished(finish))),
                Err(error) => {
                    self.ended = true;
                    return Some(Err(error));
                }
            }
        }
    }
}
