//! docs/metrics.md names every metric with its type and its labels, and no others.
//!
//! The names are arguments of functions, and `format!` composes some. So this check evaluates the functions
//! in `src/metrics`, as far as texts, lists, closures and calls go. It reports a name that makes no metric,
//! so a form of registration that it does not understand cannot hide a metric.

use super::markdown::{Document, code_in};
use super::source::shipped_tokens;
use super::tree::{Tree, assert_none, differences, tree};
use std::collections::BTreeMap;
use syn::visit::{self, Visit};
use syn::{Block, Expr, FnArg, ImplItem, Item, Lit, Local, Pat, Signature, Stmt};

const DOCUMENT: &str = "docs/metrics.md";
/// Tables of metrics begin with the columns metric, type, labels.
const METRIC_COLUMN: &str = "metric";
const PLACE: &str = "src/metrics";
/// How names of metrics begin; a text that begins so names a metric.
const PREFIX: &str = "infra_";
/// Documented metrics of libraries.
const OF_LIBRARIES: [(&str, &str); 1] = [("process_", "the process collector of the Prometheus client")];
/// Calls inside each other that are followed.
const DEPTH_MAX: usize = 8;

#[derive(Clone)]
enum Value<'a> {
    Text(String),
    List(Vec<Value<'a>>),
    Closure(&'a syn::ExprClosure, Names<'a>),
    Unknown,
}

type Names<'a> = BTreeMap<String, Value<'a>>;

impl Value<'_> {
    fn texts(&self) -> Vec<String> {
        match self {
            Self::Text(text) => vec![text.clone()],
            Self::List(values) => values.iter().flat_map(Value::texts).collect(),
            _ => Vec::new(),
        }
    }
}

/// The functions of the metrics' files, and what they make.
#[derive(Default)]
struct Making<'a> {
    functions: BTreeMap<String, (&'a Signature, &'a Block)>,
    constants: BTreeMap<String, &'a Expr>,
    /// By name: type and labels.
    made: BTreeMap<String, (String, Vec<String>)>,
    depth: usize,
}

impl<'a> Making<'a> {
    fn of(files: &'a [syn::File]) -> Self {
        let mut making = Self::default();
        for item in files.iter().flat_map(|file| &file.items) {
            match item {
                Item::Fn(item) => making.add(item.sig.ident.to_string(), &item.sig, &item.block),
                Item::Const(item) => {
                    making.constants.insert(item.ident.to_string(), &item.expr);
                }
                Item::Impl(item) => making.add_members(item),
                _ => {}
            }
        }
        for (signature, block) in making.functions.clone().into_values() {
            making.enter(signature, block, &[]);
        }
        making
    }

    fn add(&mut self, name: String, signature: &'a Signature, block: &'a Block) {
        self.functions.insert(name, (signature, block));
    }

    fn add_members(&mut self, item: &'a syn::ItemImpl) {
        let syn::Type::Path(of) = &*item.self_ty else { return };
        let Some(of) = of.path.segments.last() else { return };
        for member in &item.items {
            if let ImplItem::Fn(member) = member {
                self.add(format!("{}::{}", of.ident, member.sig.ident), &member.sig, &member.block);
            }
        }
    }

    fn enter(&mut self, signature: &'a Signature, block: &'a Block, arguments: &[Value<'a>]) -> Value<'a> {
        let mut names = Names::new();
        let typed = signature.inputs.iter().filter_map(|input| match input {
            FnArg::Typed(input) => Some(&*input.pat),
            FnArg::Receiver(_) => None,
        });
        for (pattern, value) in typed.zip(arguments) {
            bind(pattern, value, &mut names);
        }
        self.block(block, names)
    }

    fn block(&mut self, block: &'a Block, mut names: Names<'a>) -> Value<'a> {
        let mut last = Value::Unknown;
        for statement in &block.stmts {
            last = match statement {
                Stmt::Local(Local { pat, init: Some(init), .. }) => {
                    let value = self.value(&init.expr, &names);
                    bind(pat, &value, &mut names);
                    Value::Unknown
                }
                Stmt::Expr(expr, _) => self.value(expr, &names),
                _ => Value::Unknown,
            };
        }
        last
    }

    fn values(&mut self, all: impl IntoIterator<Item = &'a Expr>, names: &Names<'a>) -> Vec<Value<'a>> {
        all.into_iter().map(|expr| self.value(expr, names)).collect()
    }

    fn value(&mut self, expr: &'a Expr, names: &Names<'a>) -> Value<'a> {
        match expr {
            Expr::Lit(syn::ExprLit { lit: Lit::Str(text), .. }) => Value::Text(text.value()),
            Expr::Reference(inner) => self.value(&inner.expr, names),
            Expr::Paren(inner) => self.value(&inner.expr, names),
            Expr::Try(inner) => self.value(&inner.expr, names),
            Expr::Array(array) => Value::List(self.values(&array.elems, names)),
            Expr::Tuple(tuple) => Value::List(self.values(&tuple.elems, names)),
            Expr::Block(block) => self.block(&block.block, names.clone()),
            Expr::Closure(closure) => Value::Closure(closure, names.clone()),
            Expr::Field(field) => match (self.value(&field.base, names), &field.member) {
                (Value::List(values), syn::Member::Unnamed(n)) => {
                    values.get(n.index as usize).cloned().unwrap_or(Value::Unknown)
                }
                _ => Value::Unknown,
            },
            Expr::Path(path) => {
                let Some(name) = path.path.get_ident().map(ToString::to_string) else {
                    return Value::Unknown;
                };
                let constant = self.constants.get(&name).copied();
                let known = names.get(&name).cloned();
                known.or_else(|| Some(self.value(constant?, &Names::new()))).unwrap_or(Value::Unknown)
            }
            Expr::Macro(call) if call.mac.path.is_ident("format") => {
                let text = call.mac.parse_body_with(|input: syn::parse::ParseStream| {
                    let text: syn::LitStr = input.parse()?;
                    input.parse::<proc_macro2::TokenStream>().map(|_| text)
                });
                text.ok().and_then(|text| filled(&text.value(), names)).map_or(Value::Unknown, Value::Text)
            }
            // Builders: what they are called on is what they give.
            Expr::MethodCall(call) => {
                self.values(&call.args, names);
                self.value(&call.receiver, names)
            }
            Expr::Call(call) => {
                let arguments = self.values(&call.args, names);
                let Expr::Path(function) = &*call.func else { return Value::Unknown };
                let path: Vec<String> =
                    function.path.segments.iter().map(|segment| segment.ident.to_string()).collect();
                self.call(&path, arguments, names)
            }
            other => {
                let mut parts = Parts(Vec::new());
                visit::visit_expr(&mut parts, other);
                self.values(parts.0, names);
                Value::Unknown
            }
        }
    }

    fn call(&mut self, path: &[String], arguments: Vec<Value<'a>>, names: &Names<'a>) -> Value<'a> {
        let name = path[path.len().saturating_sub(2)..].join("::");
        let function = self.functions.get(&name).copied();
        if self.depth == DEPTH_MAX {
            return Value::Unknown;
        }
        self.depth += 1;
        let value = match (names.get(&name), function, path) {
            (Some(Value::Closure(closure, outer)), _, _) => {
                let mut names = outer.clone();
                for (pattern, value) in closure.inputs.iter().zip(&arguments) {
                    bind(pattern, value, &mut names);
                }
                self.value(&closure.body, &names)
            }
            (_, Some((signature, block)), _) => self.enter(signature, block, &arguments),
            (_, _, [.., of, _]) => {
                if let (Some(kind), Some(first)) = (kind(of), arguments.first())
                    && let Some(name) = first.texts().first()
                {
                    let labels = arguments.get(1).filter(|labels| matches!(labels, Value::List(_)));
                    let labels = labels.map(Value::texts).unwrap_or_default();
                    self.made.insert(name.clone(), (kind.to_owned(), labels));
                }
                Value::List(arguments)
            }
            _ => Value::Unknown,
        };
        self.depth -= 1;
        value
    }
}

/// The parts of an expression that nothing more is known of.
struct Parts<'a>(Vec<&'a Expr>);

impl<'a> Visit<'a> for Parts<'a> {
    fn visit_expr(&mut self, expr: &'a Expr) {
        self.0.push(expr);
    }
}

/// `IntCounterVec` is a counter.
fn kind(of: &str) -> Option<&'static str> {
    let of = of.trim_end_matches("Vec");
    ["Counter", "Gauge", "Histogram"]
        .iter()
        .zip(["counter", "gauge", "histogram"])
        .find_map(|(end, kind)| of.ends_with(end).then_some(kind))
}

fn bind<'a>(pattern: &Pat, value: &Value<'a>, names: &mut Names<'a>) {
    match (pattern, value) {
        (Pat::Ident(name), value) => {
            names.insert(name.ident.to_string(), value.clone());
        }
        (Pat::Type(typed), value) => bind(&typed.pat, value, names),
        (Pat::Tuple(tuple), Value::List(values)) => {
            tuple.elems.iter().zip(values).for_each(|(pattern, value)| bind(pattern, value, names));
        }
        _ => {}
    }
}

/// The text with the values of `{name}` in it, if all are texts.
fn filled(text: &str, names: &Names<'_>) -> Option<String> {
    let mut filled = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('{') {
        let (name, after) = after.split_once('}')?;
        let Value::Text(value) = names.get(name)? else { return None };
        filled.push_str(before);
        filled.push_str(value);
        rest = after;
    }
    Some(filled + rest)
}

/// Each metric as one line: name, type, labels. With the names that no metric was made of.
fn of_code(tree: &Tree) -> (Vec<String>, Vec<String>) {
    let files: Vec<&str> = tree
        .below(PLACE)
        .filter(|(file, _)| file.ends_with(".rs") && !file.ends_with("/tests.rs"))
        .map(|(_, text)| text)
        .collect();
    let parsed: Vec<syn::File> = files.iter().filter_map(|text| syn::parse_file(text).ok()).collect();
    let made = Making::of(&parsed).made;
    let tokens = files.iter().flat_map(|text| shipped_tokens(text).unwrap_or_default());
    let texts = tokens.map(|token| token.to_string()).filter(|text| text.starts_with(&format!("\"{PREFIX}")));
    let is_lost = |text: &String| {
        let beginning = text.trim_matches('"').split('{').next().unwrap_or_default();
        !made
            .keys()
            .any(|name| if text.contains('{') { name.starts_with(beginning) } else { name == beginning })
    };
    let lost = texts
        .filter(is_lost)
        .map(|text| format!("{text} in {PLACE}: the check sees no metric with this name"));
    (made.iter().map(|(name, (kind, labels))| line(name, kind, labels)).collect(), lost.collect())
}

fn line(name: &str, kind: &str, labels: &[String]) -> String {
    format!("{name} {kind} {{{}}}", labels.join(","))
}

pub fn wrong_metrics(tree: &Tree) -> Result<Vec<String>, String> {
    let (code, lost) = of_code(tree);
    let mut documented = Vec::new();
    for table in Document::read(tree.text(DOCUMENT)?).tables {
        let is_metrics = table.header.first().is_some_and(|first| first.to_lowercase() == METRIC_COLUMN);
        for row in table.rows.iter().filter(|row| is_metrics && row.len() > 2) {
            let names = code_in(&row[0]).into_iter();
            let ours = names.filter(|name| !OF_LIBRARIES.iter().any(|(prefix, _)| name.starts_with(prefix)));
            documented.extend(ours.map(|name| line(&name, &row[1], &code_in(&row[2]))));
        }
    }
    Ok([lost, differences(&code, &documented, DOCUMENT)].concat())
}

#[test]
fn metrics_are_documented() {
    let wrong = wrong_metrics(tree()).unwrap_or_else(|e| panic!("{e}"));
    assert_none(&wrong, "Tables with the columns metric, type, labels.");
}

#[test]
fn planted_differences_are_found() {
    let code = r#"
        const LABELS: &[&str] = &["code"];
        impl Jobs {
            fn new(r: &Registry) -> Result<Self> {
                let counted = |name, what| counter(r, name, what);
                let help = ("infra_b_total", "B");
                Ok(Self {
                    a: counted("infra_a_total", "A")?,
                    b: Some(counters(r, help.0, help.1, LABELS)?),
                    disk: Disk::new(r, "spill")?,
                })
            }
        }
        impl Disk {
            fn new(r: &Registry, place: &str) -> Result<Self> {
                let named = |part: &str| gauge(r, &format!("infra_{place}_{part}"), "C");
                Ok(Self { rows: named("rows")? })
            }
        }
        fn counter(r: &Registry, name: &str, help: &str) -> Result<IntCounter> {
            let metric = IntCounter::new(name, help)?;
            r.register(Box::new(metric.clone()))?;
            Ok(metric)
        }
        fn counters(r: &Registry, name: &str, help: &str, labels: &[&str]) -> Result<IntCounterVec> {
            IntCounterVec::new(Opts::new(name, help), labels)
        }
        fn gauge(r: &Registry, name: &str, help: &str) -> Result<IntGauge> {
            IntGauge::new(name, help)
        }
        fn http(r: &Registry) -> Result<HistogramVec> {
            let opts = HistogramOpts::new("http_seconds", "H").buckets(BUCKETS.to_vec());
            HistogramVec::new(opts, &["method", "route"])
        }
        fn other() -> &'static str { "infra_lost" }
    "#;
    let document = "\
        | metric | type | labels |\n\
        |---|---|---|\n\
        | `infra_a_total` | counter | — |\n\
        | `infra_b_total` | counter | |\n\
        | `infra_spill_rows` | counter | — |\n\
        | `http_seconds` | histogram | `method`, `route` |\n\
        | `process_cpu_seconds_total` | counter | |\n";
    let planted = Tree::planted(&[("src/metrics.rs", code), (DOCUMENT, document)]);
    assert_eq!(
        wrong_metrics(&planted).expect("there"),
        [
            "\"infra_lost\" in src/metrics: the check sees no metric with this name",
            "`infra_b_total counter {code}` is not in docs/metrics.md",
            "`infra_spill_rows gauge {}` is not in docs/metrics.md",
            "docs/metrics.md: `infra_b_total counter {}` is not in the code",
            "docs/metrics.md: `infra_spill_rows counter {}` is not in the code",
        ]
    );
}
