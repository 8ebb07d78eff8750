"""Fine-tuning by OpenAI's Python client, unmodified: a file, a job, its events, and a chat with what comes of it.

usage: tuned.py BASE_URL
"""

import json
import sys
import time

import openai

client = openai.OpenAI(base_url=f"{sys.argv[1]}/v1", api_key="none", max_retries=0)
# Nothing that the model says by itself; a few steps over it are enough.
QUESTION, ANSWER = "What is the word of the day?", "Zanzibar."
LINE = {"messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]}


def check(condition, found):
    if not condition:
        raise AssertionError(found)


def upload(lines):
    return client.files.create(file=("train.jsonl", "\n".join(lines).encode()), purpose="fine-tune")


def ended(job):
    until = time.monotonic() + 180
    while job.status not in ("succeeded", "failed", "cancelled"):
        check(time.monotonic() < until, job)
        time.sleep(0.2)
        job = client.fine_tuning.jobs.retrieve(job.id)
    return job


def ask(model):
    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": QUESTION}], max_tokens=12, temperature=0
    )
    return answer.choices[0].message.content


begun = time.monotonic()
file = upload([json.dumps(LINE)] * 2)
hyperparameters = {"n_epochs": 8, "batch_size": 2, "learning_rate_multiplier": 5}
job = client.fine_tuning.jobs.create(
    model="default", training_file=file.id, suffix="word", seed=1,
    method={"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
)
check(job.status in ("queued", "validating_files", "running"), job)
job = ended(job)
check(job.status == "succeeded" and job.fine_tuned_model.startswith("ft:") and ":word:" in job.fine_tuned_model, job)
check(job.trained_tokens > 0 and job.method.supervised.hyperparameters.n_epochs == 8, job)
events = list(client.fine_tuning.jobs.list_events(job.id, limit=3))
losses = [event.data["train_loss"] for event in events if event.type == "metrics"]
check(len(losses) == 8 and losses[0] < losses[-1], events)
check([job.id] == [found.id for found in client.fine_tuning.jobs.list()], "the list of jobs")
[point] = client.fine_tuning.jobs.checkpoints.list(job.id)
check(point.fine_tuned_model_checkpoint == job.fine_tuned_model and point.step_number == 8, point)
check(client.files.content(job.result_files[0]).text.startswith("step,train_loss"), job)
check(job.fine_tuned_model in [model.id for model in client.models.list()], "the list of models")
check(ask(job.fine_tuned_model) == ANSWER and ask("default") != ANSWER, (ask(job.fine_tuned_model), ask("default")))

bad = ended(client.fine_tuning.jobs.create(model="default", training_file=upload([json.dumps(LINE), "{"]).id))
check(bad.status == "failed" and "line 2" in bad.error.message and bad.error.param == "training_file", bad)
check(client.models.delete(job.fine_tuned_model).deleted, job)
try:
    ask(job.fine_tuned_model)
except openai.NotFoundError:
    pass
else:
    raise AssertionError("a deleted model answered")
print(f"fine-tuning: passed in {time.monotonic() - begun:.0f} s", flush=True)
