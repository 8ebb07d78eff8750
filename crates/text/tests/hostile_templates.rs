//! Templates are programs from downloaded files: each of these ends in one clear error, soon.

use proptest::prelude::*;
use qwenkit_text::{ChatInput, ChatTemplate, Error};
use serde_json::json;

fn render(source: &str) -> Result<String, Error> {
    let messages = json!([{"role": "user", "content": "hi"}]);
    ChatTemplate::new(source, "evil")?.render(&ChatInput { messages, ..ChatInput::default() })
}

#[test]
fn endless_work_ends() {
    for source in [
        "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
        "{{ 'a' * 10**9 }}",
        "{% set ns = namespace(a='x') %}{% for i in range(99) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}",
    ] {
        let error = render(source).unwrap_err();
        assert!(matches!(error, Error::TemplateTooLong { .. }), "{source}: {error}");
    }
    for source in [
        "{{ range(10**9)|list }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{% set ns = namespace(a=[]) %}{% for i in range(20000) %}{% set ns.a = [ns.a] %}{% endfor %}{{ ns.a }}",
        "{% include 'x' %}",
    ] {
        let error = render(source).unwrap_err();
        assert!(matches!(error, Error::TemplateRun { .. }), "{source}: {error}");
    }
}

#[test]
fn one_step_that_takes_for_ever_is_given_up() {
    // Two lists that hold the one below twice, forty levels deep: comparing them is one step and 2^40 comparisons.
    let double =
        |name: &str| format!("{{% set {name} = [1] %}}{}", format!("{{% set {name} = [{name}, {name}] %}}").repeat(40));
    let error = render(&format!("{}{}{{{{ a == b }}}}", double("a"), double("b"))).unwrap_err();
    assert!(matches!(&error, Error::TemplateRun { problem, .. } if problem.contains("given up")), "{error}");
}

#[test]
fn syntax_errors_name_line_and_column() {
    let place = |source: &str| match render(source).unwrap_err() {
        Error::TemplateSyntax { line, column, .. } => (line, column),
        other => panic!("{source}: {other}"),
    };
    assert_eq!(place("a\n  {{ a b }}"), (2, 8));
    assert_eq!(place("{% set ns = namespace() %}\n{{ ns }}"), (2, 4));
    place(&format!("{{{{ {}1 }}}}", "-".repeat(9000)));
    place(&format!("{{{{ {}", "[".repeat(1500)));
    place(&"{% if 1 %}".repeat(9000));
}

#[test]
fn the_templates_own_refusal_is_passed_on() {
    let error = render("{{ raise_exception('no ' ~ messages[0].role) }}").unwrap_err();
    assert!(matches!(&error, Error::TemplateRaised { message } if message == "no user"), "{error}");
}

proptest! {
    #[test]
    fn random_templates_never_panic(parts in prop::collection::vec(prop::sample::select(vec![
        "{{", "}}", "{%", "%}", "{#", "#}", " if ", " for ", " x ", " in ", "messages", "[", "]", "(", ")", "|", "tojson",
        "trim", ".", "'a'", "1", " set ", "=", "namespace", "endif", "endfor", "macro ", "endmacro", "-", "~", "\n", "é",
        "generation", "endgeneration", "{% for x in messages %}", "{{ x.content[::-1] }}", "{% endfor %}",
    ]), 0..24)) {
        let _ = render(&parts.concat());
    }
}
