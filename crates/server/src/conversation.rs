//! What every chat interface's request comes to: a conversation, the tools, the form of the answer, how to generate it.
//!
//! Contract: each interface reads its own words and says what it means here; from here on all are treated alike.

use std::sync::Arc;

use qwenkit_engine::{Ask, Hold, Priority, Prompt, Visual};
use qwenkit_text::{
    AnswerReader, CallForm, CallSyntax, ChatInput, Error as TextError, Form, Grammar, ThinkingPlan, ThinkingWish,
    ToolSet,
};
use serde_json::{Map, Value};

use crate::{
    error::{ApiError, from_engine, from_text},
    images::{Held, Images},
    models::ServedModel,
    run::{Asked, Run},
    settings::Settings,
};

/// Who decides on tool calls.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum ToolChoice {
    /// The model decides.
    #[default]
    Auto,
    /// No call; the tools are not even shown.
    Never,
    /// At least one call.
    Required,
    /// A call of this tool.
    Named(String),
}

/// A request for an answer to a conversation.
#[derive(Clone, Debug)]
pub(crate) struct Conversation {
    /// In the form that templates take.
    pub(crate) messages: Vec<Value>,
    /// In the messages, in order.
    pub(crate) images: Images,
    pub(crate) tools: ToolSet,
    pub(crate) choice: ToolChoice,
    /// Whether one answer may call several tools.
    pub(crate) many_calls: bool,
    /// The form of the answer proper.
    pub(crate) form: Option<Form>,
    pub(crate) wish: ThinkingWish,
    /// Further variables for the template.
    pub(crate) variables: Map<String, Value>,
    /// The words with which the answer begins.
    pub(crate) answer_start: String,
    pub(crate) settings: Settings,
    /// So many best tokens beside each token's log-probability.
    pub(crate) logprobs: Option<usize>,
    pub(crate) priority: Priority,
    /// What the interface calls the parameters that a refusal speaks of.
    pub(crate) names: Names,
}

/// Parameters' names in one interface.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Names {
    pub(crate) messages: &'static str,
    pub(crate) choice: &'static str,
    pub(crate) form: &'static str,
}

impl Conversation {
    /// A conversation and nothing asked of the answer.
    pub(crate) fn new(messages: Vec<Value>, settings: Settings, names: Names) -> Conversation {
        Conversation {
            messages,
            images: Images::default(),
            tools: ToolSet::default(),
            choice: ToolChoice::Auto,
            many_calls: true,
            form: None,
            wish: ThinkingWish::default(),
            variables: Map::new(),
            answer_start: String::new(),
            settings,
            logprobs: None,
            priority: Priority::default(),
            names,
        }
    }

    /// The same at another priority.
    pub(crate) fn clone_with(&self, priority: Priority) -> Conversation {
        Conversation { priority, ..self.clone() }
    }

    /// Has a model answer, as often as the settings say.
    ///
    /// # Errors
    /// When the model cannot do what is asked, or takes no more requests.
    pub(crate) async fn start(self, model: &Arc<ServedModel>) -> Result<Answering, ApiError> {
        let tools = if self.choice == ToolChoice::Never { ToolSet::default() } else { self.tools.clone() };
        let messages = self.names.messages;
        let shown = tools.clone();
        let input = self.prompt(model)?;
        let asks = move |model: &ServedModel| {
            let hold = self.hold(model, &shown)?;
            let Held { visuals, memory } = self.images.held(model)?;
            let ask =
                |i| Ask { adapter: model.adapter.clone(), ..self.ask(i, input.clone(), visuals.clone(), hold.clone()) };
            Ok(Asked { asks: (0..self.settings.answers).map(ask).collect(), memory })
        };
        let run = Run::start(model, asks, messages).await?;
        Ok(Answering { run, tools })
    }

    /// What the template gets for an answer of this model.
    ///
    /// # Errors
    /// When the model cannot think as it is asked to.
    pub(crate) fn prompt(&self, model: &ServedModel) -> Result<ChatInput, ApiError> {
        let plan = model.thinking.plan(&self.wish).map_err(|error| from_text(&error, &self.wish.switch))?;
        let tools = if self.choice == ToolChoice::Never { ToolSet::default() } else { self.tools.clone() };
        Ok(self.input(&tools, &plan))
    }

    /// Tokens of the prompt, images included.
    ///
    /// # Errors
    /// As `prompt` and `start`.
    pub(crate) fn count(&self, model: &ServedModel) -> Result<usize, ApiError> {
        let prompt = Prompt::Chat(Box::new(self.prompt(model)?));
        let held = self.images.held(model)?;
        let ids = model.session.prompt_ids_with(&prompt, held.visuals);
        ids.map(|ids| ids.len()).map_err(|error| from_engine(&error, self.names.messages))
    }

    fn input(&self, tools: &ToolSet, plan: &ThinkingPlan) -> ChatInput {
        let mut kwargs = self.variables.clone();
        kwargs.extend(plan.kwargs.clone());
        ChatInput {
            messages: Value::Array(self.messages.clone()),
            tools: tools.for_template(),
            add_generation_prompt: true,
            kwargs,
            suffix: plan.suffix,
            answer_start: self.answer_start.clone(),
        }
    }

    fn ask(&self, i: usize, input: ChatInput, visuals: Vec<Visual>, hold: Hold) -> Ask {
        let settings = &self.settings;
        Ask {
            prompt: Prompt::Chat(Box::new(input)),
            visuals,
            sampling: settings.sampling_of(i),
            max_tokens: settings.max_tokens,
            min_tokens: settings.min_tokens,
            stop: settings.stop.clone(),
            logprobs: self.logprobs,
            prompt_logprobs: None,
            ignore_stop_tokens: settings.ignore_stop_tokens,
            stop_tokens: settings.stop_tokens.clone(),
            priority: self.priority,
            hold,
            adapter: None,
        }
    }

    fn hold(&self, model: &ServedModel, tools: &ToolSet) -> Result<Hold, ApiError> {
        let compile = |form: &Form, at: &str| model.session.grammar(form).map_err(|error| from_engine(&error, at));
        let calls = self.calls(model, tools)?;
        let forced = matches!(self.choice, ToolChoice::Required | ToolChoice::Named(_));
        let form: Option<Grammar> = match (&self.form, &calls) {
            (_, Some(calls)) if forced => Some(compile(&Form::Calls(calls.clone()), self.names.choice)?),
            (Some(Form::Json(schema)), Some(calls)) => {
                let either = CallForm { or_json: Some(schema.clone()), ..calls.clone() };
                Some(compile(&Form::Calls(either), self.names.form)?)
            }
            (Some(Form::AnyJson), Some(calls)) => {
                let object = serde_json::json!({ "type": "object" });
                Some(compile(&Form::Calls(CallForm { or_json: Some(object), ..calls.clone() }), self.names.form)?)
            }
            (Some(_), Some(_)) => {
                let message = format!("`{}` and tools cannot be held to at once", self.names.form);
                return Err(ApiError::invalid(self.names.form, message).with_code("unsupported_parameter"));
            }
            (Some(form), None) => Some(compile(form, self.names.form)?),
            (None, _) => None,
        };
        let is_strict = tools.tools().iter().any(|tool| tool.is_strict);
        let one = |calls: CallForm| CallForm { many: false, ..calls };
        let calls = match calls.filter(|_| form.is_none() && is_strict) {
            Some(calls) => Some(compile(&Form::Calls(one(calls)), "tools")?),
            None => None,
        };
        Ok(Hold {
            form,
            calls,
            thought_tokens: self.wish.budget_tokens.map(|tokens| usize::try_from(tokens).unwrap_or(usize::MAX)),
            circles: self.settings.ignore_stop_tokens,
            one_call: !self.many_calls && !tools.is_empty(),
        })
    }

    /// The calls that an answer may hold.
    fn calls(&self, model: &ServedModel, tools: &ToolSet) -> Result<Option<CallForm>, ApiError> {
        if tools.is_empty() {
            return Ok(None);
        }
        let Some(syntax) = model.session.template().and_then(CallSyntax::of_template) else {
            let message = format!("{} was not taught to call tools: its chat template knows none", model.name);
            return Err(ApiError::invalid("tools", message).with_code("unsupported_parameter"));
        };
        let callable = match &self.choice {
            ToolChoice::Named(name) => tools.get(name).into_iter().cloned().collect(),
            _ => tools.tools().to_vec(),
        };
        let many = self.many_calls && !matches!(self.choice, ToolChoice::Named(_));
        Ok(Some(CallForm { syntax, tools: callable, many, or_json: None }))
    }
}

/// Answers under way.
pub(crate) struct Answering {
    pub(crate) run: Run,
    /// Those that the model may call.
    pub(crate) tools: ToolSet,
}

impl Answering {
    /// A fresh reader of one answer.
    pub(crate) fn reader(&self) -> AnswerReader {
        let opening = self.run.transcripts().first().map_or(qwenkit_text::Opening::Unopened, |t| t.opening());
        AnswerReader::new(opening, &self.tools)
    }
}

/// The wish that the switches of a request come to.
///
/// # Errors
/// When they contradict each other or one has a wrong value.
pub(crate) fn wish(switches: &Map<String, Value>) -> Result<ThinkingWish, ApiError> {
    let mut wish = ThinkingWish::of_request(switches).map_err(|error| match &error {
        TextError::ThinkingConflict { second, .. } => {
            let at = second.split(':').next().unwrap_or_default().to_owned();
            from_text(&error, &at)
        }
        _ => from_text(&error, ""),
    })?;
    // No token of thought at all is no thought.
    if wish.budget_tokens == Some(0) && wish.thinks.is_none() {
        (wish.thinks, wish.budget_tokens) = (Some(false), None);
        wish.switch = "thinking_budget: 0".to_owned();
    }
    Ok(wish)
}
