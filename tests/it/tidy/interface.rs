//! docs/api.md has a section for every route, and docs/errors.md a row for every code, with its status and
//! the title of that status, and no others.

use super::markdown::{Document, code_in};
use super::source::is_test;
use super::tree::{Tree, assert_none, differences, tree};
use http::StatusCode;
use std::collections::BTreeSet;
use syn::visit::{self, Visit};
use syn::{Expr, Item, Lit};

const ROUTES_DOCUMENT: &str = "docs/api.md";
const CODES_DOCUMENT: &str = "docs/errors.md";
/// Tables of codes begin with the columns code, status.
const CODE_COLUMN: &str = "code";
/// The title of a problem is the reason phrase of its status.
const TITLE_COLUMN: &str = "title";

/// The folder whose table of routes is a list of this type.
const API: &str = "src/api";
const ROUTE: &str = "Route";
/// The part of the name of the files that map errors to codes.
const PROBLEM: &str = "problem";

/// The texts, paths and numbers of an expression.
#[derive(Default)]
struct Words {
    texts: Vec<String>,
    paths: Vec<Vec<String>>,
    numbers: Vec<u16>,
}

impl<'ast> Visit<'ast> for Words {
    fn visit_lit(&mut self, lit: &'ast Lit) {
        match lit {
            Lit::Str(text) => self.texts.push(text.value()),
            Lit::Int(number) => self.numbers.extend(number.base10_parse::<u16>()),
            _ => {}
        }
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        self.paths.push(path.segments.iter().map(|segment| segment.ident.to_string()).collect());
        visit::visit_path(self, path);
    }
}

impl Words {
    fn of(expr: &Expr) -> Self {
        let mut words = Self::default();
        words.visit_expr(expr);
        words
    }

    /// `GET /status/:jobId`, if this is a row of the table of routes.
    fn route(&self) -> Option<String> {
        let pattern = self.texts.iter().find(|text| text.starts_with('/'))?;
        let method = self.paths.iter().find_map(|path| match &path[..] {
            [.., of, method] if of == "Method" => Some(method.clone()),
            [function] => ["get", "post", "put", "patch", "delete", "head", "options"]
                .contains(&function.as_str())
                .then(|| function.to_uppercase()),
            _ => None,
        });
        Some(format!("{} {pattern}", method?))
    }

    /// The codes with the status, if there is one status.
    fn codes(&self) -> Option<(Vec<&String>, u16)> {
        let named = self.paths.iter().filter_map(|path| status(path.last()?));
        let numbers = self.numbers.iter().copied().filter(|number| (400..600).contains(number));
        let statuses: BTreeSet<u16> = named.chain(numbers).collect();
        let codes: Vec<&String> = self.texts.iter().filter(|text| is_code(text)).collect();
        let status = statuses.first().copied().filter(|_| statuses.len() == 1 && !codes.is_empty());
        Some((codes, status?))
    }
}

fn is_code(text: &str) -> bool {
    text.len() > 2 && text.chars().all(|c| c.is_ascii_lowercase() || c == '_')
}

/// `NOT_FOUND` is 404.
fn status(name: &str) -> Option<u16> {
    (400..600).find(|number| {
        let reason = StatusCode::from_u16(*number).ok().and_then(|status| status.canonical_reason());
        reason.is_some_and(|reason| reason.to_uppercase().replace([' ', '-'], "_") == name)
    })
}

fn items(tree: &Tree, is_of_interest: impl Fn(&str) -> bool) -> Vec<Item> {
    let files = tree.below(API).filter(|(file, _)| file.ends_with(".rs") && !file.ends_with("/tests.rs"));
    let parsed =
        files.filter(|(file, _)| is_of_interest(file)).filter_map(|(_, text)| syn::parse_file(text).ok());
    parsed.flat_map(|file| file.items).collect()
}

fn routes(tree: &Tree) -> BTreeSet<String> {
    let mut routes = BTreeSet::new();
    for item in items(tree, |_| true) {
        let (of, list) = match &item {
            Item::Static(item) => (&item.ty, &item.expr),
            Item::Const(item) => (&item.ty, &item.expr),
            _ => continue,
        };
        let mut words = Words::default();
        words.visit_type(of);
        let list = if let Expr::Reference(list) = &**list { &list.expr } else { list };
        if let (true, Expr::Array(list)) =
            (words.paths.iter().any(|path| path.ends_with(&[ROUTE.to_owned()])), &**list)
        {
            routes.extend(list.elems.iter().filter_map(|row| Words::of(row).route()));
        }
    }
    routes
}

pub fn wrong_routes(tree: &Tree) -> Result<Vec<String>, String> {
    let document = Document::read(tree.text(ROUTES_DOCUMENT)?);
    let is_route = |text: &String| {
        text.split_once(" /").is_some_and(|(method, _)| method.chars().all(|c| c.is_ascii_uppercase()))
    };
    // `{jobId}`, as OpenAPI writes it, is `:jobId`.
    let named = document.headings.iter().flat_map(|heading| code_in(&heading.text)).filter(is_route);
    let documented: Vec<String> = named.map(|route| route.replace('{', ":").replace('}', "")).collect();
    Ok(differences(&routes(tree), &documented, ROUTES_DOCUMENT))
}

/// Rows with a code and its status: arms of a match, tuples, calls and structs.
#[derive(Default)]
struct Codes {
    /// As `code status`.
    found: BTreeSet<String>,
    /// Codes that stand in no row with their status.
    alone: BTreeSet<String>,
}

impl Codes {
    /// Adds a row, or looks for rows inside it.
    fn row(&mut self, words: &Words) -> bool {
        let Some((codes, status)) = words.codes() else { return false };
        self.found.insert(format!("{} {status}", codes[0]));
        true
    }
}

impl<'ast> Visit<'ast> for Codes {
    fn visit_item(&mut self, item: &'ast Item) {
        let is_test = match item {
            Item::Mod(item) => is_test(&item.attrs),
            Item::Fn(item) => is_test(&item.attrs),
            _ => false,
        };
        if !is_test {
            visit::visit_item(self, item);
        }
    }

    fn visit_arm(&mut self, arm: &'ast syn::Arm) {
        if !self.row(&Words::of(&arm.body)) {
            visit::visit_arm(self, arm);
        }
    }

    fn visit_expr(&mut self, expr: &'ast Expr) {
        let may_be_row = matches!(expr, Expr::Tuple(_) | Expr::Call(_) | Expr::Struct(_));
        if !(may_be_row && self.row(&Words::of(expr))) {
            visit::visit_expr(self, expr);
        }
    }

    fn visit_lit(&mut self, lit: &'ast Lit) {
        if let Lit::Str(text) = lit
            && is_code(&text.value())
            && text.value().contains('_')
        {
            self.alone.insert(text.value());
        }
    }

    fn visit_attribute(&mut self, _: &'ast syn::Attribute) {}
}

pub fn wrong_codes(tree: &Tree) -> Result<Vec<String>, String> {
    let mut codes = Codes::default();
    items(tree, |file| file.contains(PROBLEM)).iter().for_each(|item| codes.visit_item(item));
    let alone = codes.alone.iter().map(|code| format!("`{code}` stands in no row with its status"));
    let mut wrong: Vec<String> = alone.collect();
    let (mut listed, mut documented) = (BTreeSet::new(), Vec::new());
    for table in Document::read(tree.text(CODES_DOCUMENT)?).tables {
        let is_codes = table.header.first().is_some_and(|first| first.to_lowercase() == CODE_COLUMN);
        let title = table.header.iter().position(|column| column.to_lowercase() == TITLE_COLUMN);
        for row in table.rows.iter().filter(|row| is_codes && row.len() > 1) {
            let status = row[1].trim_matches('`');
            for code in code_in(&row[0]) {
                if !listed.insert(code.clone()) {
                    wrong.push(format!("{CODES_DOCUMENT}: `{code}` has two rows"));
                }
                if title.is_some_and(|title| row.get(title).map(String::as_str) != reason(status)) {
                    wrong.push(format!("{CODES_DOCUMENT}: `{code}` has another title than {status}"));
                }
                documented.push(format!("{code} {status}"));
            }
        }
    }
    wrong.extend(differences(&codes.found, &documented, CODES_DOCUMENT));
    Ok(wrong)
}

/// The reason phrase of a status.
fn reason(status: &str) -> Option<&'static str> {
    status.parse::<StatusCode>().ok()?.canonical_reason()
}

#[test]
fn routes_are_documented() {
    let wrong = wrong_routes(tree()).unwrap_or_else(|e| panic!("{e}"));
    assert_none(&wrong, "A heading for each, such as \"### `POST /run`\".");
}

#[test]
fn problem_codes_are_documented() {
    let wrong = wrong_codes(tree()).unwrap_or_else(|e| panic!("{e}"));
    assert_none(&wrong, "Tables with the columns code, status, title; one row a code.");
}

#[test]
fn planted_differences_are_found() {
    let routes = r#"
        static TABLE: &[Route] = &[
            post("/run", Endpoint::Run, &[200]),
            get("/status/:jobId", &[200]),
            Route { pattern: "/functions/:id", method: Method::PUT },
        ];
        const OTHER: &[&str] = &["/x"];
    "#;
    let problems = r#"
        fn row(error: &ApiError) -> Row {
            match error {
                E::A | E::B { .. } => Row::new(StatusCode::NOT_FOUND, "no_such_job", "Not Found"),
                E::C => (StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", "in x"),
                E::D(s) => match s { S::F => row(503, "overloaded"), S::G => row(400, "refused_by_queue") },
            }
        }
        fn code() -> &'static str { "on_its_own" }
        #[cfg(test)]
        mod tests { fn t() { row(400, "only_in_tests") } }
    "#;
    let headings =
        "### `POST /run`\n### `GET /status/{jobId}`\n### `DELETE /functions/:id`\n## About `run`\n";
    let codes = "\
        | code | status | title |\n\
        |---|---|---|\n\
        | `no_such_job` | 404 | Not Found |\n\
        | `overloaded` | 500 | Internal Server Error |\n\
        | `refused_by_queue` | 400 | Refused |\n\
        | `no_such_job` | 404 | Not Found |\n";
    let planted = Tree::planted(&[
        ("src/api/routes.rs", routes),
        ("src/api/problem.rs", problems),
        (ROUTES_DOCUMENT, headings),
        (CODES_DOCUMENT, codes),
    ]);
    assert_eq!(
        wrong_routes(&planted).expect("there"),
        [
            "`PUT /functions/:id` is not in docs/api.md",
            "docs/api.md: `DELETE /functions/:id` is not in the code",
        ]
    );
    assert_eq!(
        wrong_codes(&planted).expect("there"),
        [
            "`on_its_own` stands in no row with its status",
            "docs/errors.md: `refused_by_queue` has another title than 400",
            "docs/errors.md: `no_such_job` has two rows",
            "`body_too_large 413` is not in docs/errors.md",
            "`overloaded 503` is not in docs/errors.md",
            "docs/errors.md: `overloaded 500` is not in the code",
        ]
    );
}
