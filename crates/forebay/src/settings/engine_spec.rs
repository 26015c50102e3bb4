//! `--engine`: engines that `serve` starts (`embedded:4,role=prefill`) and engines that it attaches by URL
//! (`vllm=http://host:8000,role=decode`).

use std::{fmt, num::NonZeroU32};

use forebay_types::Role;

use super::{
    attach_spec::AttachSpec,
    nearest::nearest,
    value::{Form, Value},
};

/// One `--engine`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum EngineSpec {
    /// Engines of one kind that `serve` starts in its own process.
    Local(LocalSpec),
    /// An engine elsewhere.
    Attached(Box<AttachSpec>),
}

/// Engines of one kind that `serve` starts in its own process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LocalSpec {
    /// What computes.
    pub(crate) kind: EngineKind,
    /// How many of them.
    pub(crate) count: NonZeroU32,
    /// What they may be asked to do.
    pub(crate) role: Role,
}

/// What computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EngineKind {
    /// The small real engine: real weights on the CPU.
    Embedded,
    /// The simulated engine: real scheduling, no arithmetic.
    Sim,
}

impl EngineKind {
    const ALL: [EngineKind; 2] = [EngineKind::Embedded, EngineKind::Sim];

    /// `embedded` or `sim`, as in engine names.
    pub(crate) fn name(self) -> &'static str {
        match self {
            EngineKind::Embedded => "embedded",
            EngineKind::Sim => "sim",
        }
    }
}

/// A process holds this many engines at most: each is a thread and a KV pool.
pub(crate) const ENGINES_MAX: u32 = 4_096;

impl EngineSpec {
    /// The engines to start, if that is what it says.
    pub(crate) fn local(&self) -> Option<LocalSpec> {
        match self {
            EngineSpec::Local(local) => Some(*local),
            EngineSpec::Attached(_) => None,
        }
    }

    /// The engine to attach, if that is what it says.
    pub(crate) fn attached(&self) -> Option<&AttachSpec> {
        match self {
            EngineSpec::Local(_) => None,
            EngineSpec::Attached(attached) => Some(attached),
        }
    }

    /// Reads one specification.
    ///
    /// # Errors
    /// A sentence that says which part is wrong and what would be right.
    pub(crate) fn from_text(text: &str) -> Result<Self, String> {
        match AttachSpec::from_text(text) {
            Some(attached) => attached.map(|spec| Self::Attached(Box::new(spec))),
            None => LocalSpec::from_text(text).map(Self::Local),
        }
    }
}

impl LocalSpec {
    fn from_text(text: &str) -> Result<Self, String> {
        let (head, options) = text.split_once(',').map_or((text, None), |(head, rest)| (head, Some(rest)));
        let (kind, count) = head.split_once(':').map_or((head, None), |(kind, count)| (kind, Some(count)));
        let mut spec = LocalSpec {
            kind: parse_kind(kind)?,
            count: count.map_or(Ok(NonZeroU32::MIN), parse_count)?,
            role: Role::Both,
        };
        let mut role_given = false;
        for option in options.into_iter().flat_map(|options| options.split(',')) {
            match option.split_once('=') {
                Some(("role", _)) if role_given => return Err("role is given twice".to_owned()),
                Some(("role", role)) => spec.role = parse_role(role)?,
                _ => {
                    return Err(format!(
                        "unknown option `{option}`; the only one is role=prefill|decode|both"
                    ));
                }
            }
            role_given = true;
        }
        Ok(spec)
    }
}

impl fmt::Display for EngineSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            EngineSpec::Local(LocalSpec { kind, count, role }) => {
                write!(f, "{}:{count}", kind.name())?;
                match role {
                    Role::Both => Ok(()),
                    role => write!(f, ",role={}", role_name(*role)),
                }
            }
            EngineSpec::Attached(attached) => attached.fmt(f),
        }
    }
}

fn parse_kind(kind: &str) -> Result<EngineKind, String> {
    if let Some(known) = EngineKind::ALL.into_iter().find(|known| known.name() == kind) {
        return Ok(known);
    }
    let near = nearest(kind, EngineKind::ALL.map(EngineKind::name));
    let hint = near.map_or(String::new(), |near| format!("; did you mean `{near}`?"));
    Err(format!(
        "unknown engine kind `{kind}`, known are embedded, sim and the URL of a server such as http://host:8000{hint}"
    ))
}

fn parse_count(count: &str) -> Result<NonZeroU32, String> {
    count
        .parse()
        .ok()
        .filter(|count: &NonZeroU32| count.get() <= ENGINES_MAX)
        .ok_or_else(|| format!("`{count}` is no number of engines; it must be 1 to {ENGINES_MAX}"))
}

/// Reads `prefill`, `decode` or `both`.
pub(super) fn parse_role(role: &str) -> Result<Role, String> {
    match role {
        "prefill" => Ok(Role::Prefill),
        "decode" => Ok(Role::Decode),
        "both" => Ok(Role::Both),
        _ => {
            let near = nearest(role, ["prefill", "decode", "both"]);
            let hint = near.map_or(String::new(), |near| format!("; did you mean `{near}`?"));
            Err(format!("unknown role `{role}`, known are prefill, decode and both{hint}"))
        }
    }
}

/// `prefill`, `decode` or `both`.
pub(super) fn role_name(role: Role) -> &'static str {
    match role {
        Role::Prefill => "prefill",
        Role::Decode => "decode",
        Role::Both => "both",
    }
}

/// Any number of engines. In an environment variable, specifications are separated by spaces.
impl Value for Vec<EngineSpec> {
    const FORM: Form = Form::Engines;
    const EXPECTED: &'static str = "KIND[:N][,role=prefill|decode|both] such as embedded:4, or [KIND=]URL[,OPTION=VALUE...] such as \
         vllm=http://host:8000,role=decode";
    const PLACEHOLDER: &'static str = "KIND[:N]|[KIND=]URL[,role=ROLE]";

    fn parse(text: &str) -> Result<Self, String> {
        let specs: Vec<EngineSpec> = match text.trim() {
            "none" => return Ok(Vec::new()),
            text => text.split_whitespace().map(EngineSpec::from_text).collect::<Result<_, _>>()?,
        };
        if specs.is_empty() {
            return Err("at least one engine is needed; `none` where agents bring them all".to_owned());
        }
        let mut names: Vec<&str> = specs.iter().filter_map(|spec| spec.attached()?.name.as_deref()).collect();
        names.sort_unstable();
        match names.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => Err(format!("two engines are called `{}`", pair[0])),
            None => Ok(specs),
        }
    }

    fn parse_all(texts: &[String]) -> Result<Self, String> {
        Self::parse(&texts.join(" "))
    }

    fn show(&self) -> String {
        match self.as_slice() {
            [] => "none".to_owned(),
            specs => specs.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(kind: EngineKind, count: u32, role: Role) -> Result<EngineSpec, String> {
        let count = NonZeroU32::new(count).expect("a test's count");
        Ok(EngineSpec::Local(LocalSpec { kind, count, role }))
    }

    #[test]
    fn specifications_read_as_documented() {
        let check = |text: &str, expected: Result<EngineSpec, String>| {
            assert_eq!(EngineSpec::from_text(text), expected, "{text}");
        };
        check("embedded", spec(EngineKind::Embedded, 1, Role::Both));
        check("embedded:4", spec(EngineKind::Embedded, 4, Role::Both));
        check("sim:64", spec(EngineKind::Sim, 64, Role::Both));
        check("embedded:2,role=prefill", spec(EngineKind::Embedded, 2, Role::Prefill));
        check("sim,role=decode", spec(EngineKind::Sim, 1, Role::Decode));
        check("sim:4096,role=both", spec(EngineKind::Sim, 4_096, Role::Both));
    }

    #[test]
    fn mistakes_are_named() {
        let check = |text: &str, expected: &str| {
            let error = EngineSpec::from_text(text).expect_err(text);
            assert!(error.contains(expected), "{text}: {error}");
        };
        check("embeded:4", "did you mean `embedded`?");
        check("", "unknown engine kind ``");
        check("gpu:4", "known are embedded, sim and the URL of a server");
        check("embedded:0", "`0` is no number of engines; it must be 1 to 4096");
        check("sim:4097", "must be 1 to 4096");
        check("sim:-1", "`-1` is no number of engines");
        check("sim:", "`` is no number of engines");
        check("sim:2:3", "`2:3` is no number of engines");
        check("sim:2,role=prefil", "did you mean `prefill`?");
        check("sim:2,rank=3", "unknown option `rank=3`");
        check("sim:2,", "unknown option ``");
        check("sim,role=both,role=decode", "role is given twice");
    }

    #[test]
    fn a_list_joins_what_every_flag_said_and_shows_itself() {
        let texts = ["embedded:2,role=prefill".to_owned(), "vllm=http://h:1 sim".to_owned()];
        let specs = Vec::<EngineSpec>::parse_all(&texts).expect("three good specifications");
        assert_eq!(specs.show(), "embedded:2,role=prefill vllm=http://h:1 sim:1");
        assert_eq!(Vec::<EngineSpec>::parse(&specs.show()), Ok(specs));
        assert!(Vec::<EngineSpec>::parse(" ").is_err());
        assert_eq!(Vec::<EngineSpec>::parse("none"), Ok(Vec::new()));
        let twice = Vec::<EngineSpec>::parse("http://h:1,name=a http://h:2,name=a");
        assert_eq!(twice, Err("two engines are called `a`".to_owned()));
    }
}
