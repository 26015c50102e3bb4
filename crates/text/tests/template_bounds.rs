//! What a hostile chat template, or a hostile request to a harmless one, may cost: fuel, never seconds or the process.
#![allow(clippy::unwrap_used, reason = "an unexpected value is a failed test")]

use forebay_text::{ChatTemplate, Conversation, Message, TEMPLATE_BYTES_MAX, TemplateError, Tokenizer};
use serde_json::value::RawValue;

fn render(source: &str, tools: Option<&str>) -> Result<String, TemplateError> {
    let messages = [Message::new("user", "hello")];
    let tools: Option<Box<RawValue>> = tools.map(|json| RawValue::from_string(json.to_owned()).unwrap());
    let conversation =
        Conversation { messages: &messages, tools: tools.as_deref(), ..Conversation::default() };
    ChatTemplate::new(source, &Tokenizer::bytes())?.render(&conversation)
}

#[track_caller]
fn exhausts(source: &str) {
    let result = render(source, None);
    assert!(matches!(result, Err(TemplateError::Exhausted)), "{source}: {:?}", result.map(|text| text.len()));
}

#[track_caller]
fn fails(source: &str, says: &str) {
    let error = render(source, None).unwrap_err().to_string();
    assert!(error.contains(says) && error.len() < 1_000, "{source}: {error}");
}

/// Each would take hours, or more memory than there is.
#[test]
fn work_is_bounded_by_fuel() {
    exhausts("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}");
    exhausts(
        "{% macro m(n) %}{% for a in range(99999) %}{{ m(n) }}{% endfor %}{% endmacro %}{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    );
    exhausts("{% for a in range(99999) %}{{ 'x' * 100000 }}{% endfor %}");
    exhausts(
        "{% set ns = namespace(x='x') %}{% for a in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    );
    exhausts("{{ '%09000000000d' | format(1) }}");
    exhausts("{{ ('x' * 9000000) | replace('x', 'y' * 100) }}");
    exhausts("{{ ('x\n' * 9000000) | indent(1000) }}");
    exhausts("{% for a in range(99999) %}{{ ('x' * 90000) | batch(1) | list | length }}{% endfor %}");
    exhausts("{{ ([1] * 99999999) | join('x' * 100) }}");
    exhausts("{% for a in range(99999) %}{{ ('x' * 99999) | trim('y' * 99999 ~ 'x') }}{% endfor %}");
}

/// minijinja charges Python's methods when they are done; these ended the process.
#[test]
fn methods_ask_before_they_make_much_of_little() {
    let big = "{% set x = 'x' * 1000000 %}";
    exhausts(&format!("{big}{{{{ x.replace('', x) | length }}}}"));
    exhausts(&format!("{big}{{{{ x.replace('x', x) | length }}}}"));
    exhausts(&format!("{big}{{{{ x.join([1] * 100000) | length }}}}"));
    exhausts(&format!("{big}{{{{ x.join(range(99999)) | length }}}}"));
    exhausts(&format!("{big}{{{{ ('{{}}' * 1000).format(*([x] * 1000)) | length }}}}"));
    exhausts("{{ '{:>9000000000}'.format(1) | length }}");
    exhausts("{{ '{:.9000000000f}'.format(1.5) | length }}");
    exhausts("{{ ('x' * 30000000).split('x') | length }}");
    exhausts("{{ ('x ' * 30000000).split() | length }}");
    exhausts("{{ ('\n' * 30000000).splitlines() | length }}");
    exhausts("{{ ([1] * 99999999).count(2) }}");
    exhausts("{{ 'x'.startswith([' '] * 99999999) }}");
    exhausts("{% for a in range(99999) %}{{ ('x' * 99999).strip('y' * 99999 ~ 'x') }}{% endfor %}");
    // And do their work where it is little.
    let check =
        |source: &str, expected: &str| assert_eq!(render(source, None).unwrap(), expected, "{source}");
    check("{{ 'a-b-c'.replace('-', '+', 1) }}{{ 'ab'.replace('', '.') }}", "a+b-c.a.b.");
    check("{{ 'a b'.split() | join('|') }}{{ 'a,b'.split(',', 1)[1] }}", "a|bb");
    check("{{ ','.join([1, 'x', [2]]) }}{{ 'x'.startswith(['a', 'x']) }}", "1,x,[2]True");
    check("{{ '{:>4}|{}'.format(1, 'b') }}{{ 'xaxb'.strip('xb') }}{{ [1, 1].count(1) }}", "   1|ba2");
    check("{{ ' a ' | trim }}{{ 'xax' | trim('x') }}{{ [1, none] | string }}{{ {'a': 'b'} }}", {
        "aa[1, None]{'a': 'b'}"
    });
    let long =
        format!("{{{{ ('word ' * 1000000).replace('word', '{}').split() | length }}}}", "w".repeat(20));
    check(&long, "1000000");
}

/// A list that holds another twice, forty levels deep, has 2^40 leaves in a kilobyte.
#[test]
fn text_of_containers_is_bounded() {
    let twice =
        "{% set ns = namespace(x=[]) %}{% for a in range(40) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}";
    for end in [
        "{{ ns.x }}",
        "{{ ns.x | tojson }}",
        "{{ ns.x | string }}",
        "{{ ','.join(ns.x) }}",
        "{{ '{}'.format(ns.x) }}",
        "{{ raise_exception(ns.x) }}",
    ] {
        exhausts(&format!("{twice}{end}"));
    }
    exhausts("{{ [1, 2] | tojson(indent=1000000000000) }}");
    exhausts("{{ ([1] * 90000000) | tojson }}");
    exhausts("{{ [1, 2] | tojson(separators=['x' * 100000000, '']) }}");
}

/// `tojson(indent=4)` is what the templates of Llama 3 do with the client's own tools.
#[test]
fn deep_tools_are_not_blown_up_by_indentation() {
    let deep = |items: usize| format!("{}{}{}", "[".repeat(120), vec!["1"; items].join(","), "]".repeat(120));
    let source = "{{ tools | tojson(indent=4) }}";
    let text = render(source, Some(&deep(1_000))).unwrap();
    assert!(text.len() > 480_000, "{}", text.len());
    let blown_up = render(source, Some(&deep(500_000)));
    assert!(matches!(blown_up, Err(TemplateError::Exhausted)), "a megabyte that would be 240");
    let too_deep = render(source, Some(&format!("{}{}", "[".repeat(200), "]".repeat(200)))).unwrap_err();
    assert!(too_deep.to_string().contains("tools"), "{too_deep}");
}

#[test]
fn recursion_ends() {
    fails("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion limit");
    fails("{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}", "recursion limit");
    fails("{% include 'chat_template' %}", "could not render include");
    fails(
        "{% macro m() %}{{ caller() }}{% endmacro %}{% macro n() %}{% call m() %}{{ n() }}{% endcall %}{% endmacro %}{{ n() }}",
        "recursion limit",
    );
}

#[test]
fn there_are_no_files_and_no_insides() {
    for name in ["/etc/passwd", "../tokenizer.json", "file:///etc/passwd"] {
        fails(&format!("{{% include '{name}' %}}"), "non-existing template");
        fails(&format!("{{% extends '{name}' %}}"), "does not exist");
        fails(&format!("{{% import '{name}' as x %}}"), "non-existing template");
    }
    for walk in ["''.__class__.__mro__", "messages.__init__.__globals__", "namespace.__globals__.os"] {
        fails(&format!("{{{{ {walk} }}}}"), "undefined value");
    }
    for function in ["open('/etc/passwd')", "import_module('os')", "lipsum()", "cycler(1)", "self()"] {
        fails(&format!("{{{{ {function} }}}}"), "function");
    }
}

#[test]
fn what_errors_quote_is_bounded() {
    fails("{{ raise_exception('x' * 100000) }}", "refused the messages: xxx");
    fails("{% include 'x' * 100000 %}", "non-existing template");
    fails("{{ nothing('x').y }}", "nothing");
}

/// Chains of operators, for each of which the compiler calls itself, as long as a template may be.
#[test]
fn long_chains_do_not_overflow_the_stack_of_the_compiler() {
    let bytes = TEMPLATE_BYTES_MAX - 10;
    let chains = [
        format!("{{{{ {}1 }}}}", "1+".repeat(bytes / 2)),
        format!("{{{{ {}1 }}}}", "-".repeat(bytes)),
        format!("{{{{ {}1 }}}}", "not ".repeat(bytes / 4)),
        format!("{{{{ {}1 }}}}", "1**".repeat(bytes / 3)),
        format!("{{{{ a{} }}}}", ".a".repeat(bytes / 2)),
        format!("{{{{ a{} }}}}", "|e".repeat(bytes / 2)),
        format!("{{{{ {}1 }}}}", "(".repeat(bytes)),
        format!("{{% if a %}}{}", "{%elif a%}".repeat(bytes / 10 - 2)),
    ];
    for chain in chains {
        let _compiled_or_not = ChatTemplate::new(&chain, &Tokenizer::bytes());
    }
    let long = ChatTemplate::new(&"x".repeat(TEMPLATE_BYTES_MAX + 1), &Tokenizer::bytes()).unwrap_err();
    let says = "the model's chat template cannot be compiled: it has 65537 bytes; at most 65536 are taken";
    assert_eq!(long.to_string(), says);
}
