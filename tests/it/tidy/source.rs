//! A Rust file as the plain data that the checks compare. [`super::reader`] makes it.

use proc_macro2::{Delimiter, TokenStream, TokenTree};
use std::collections::BTreeSet;
use syn::Attribute;

/// One file of `src/`.
#[derive(Default)]
pub struct Source {
    pub file: String,
    /// The module that the file is, then its inline modules. Test modules are left out.
    pub scopes: Vec<Scope>,
    /// First line, name and length of each function, those of tests included.
    pub functions: Vec<(usize, String, usize)>,
    /// First line and length of each inline test module.
    pub test_modules: Vec<(usize, usize)>,
}

/// A module, as far as it stands in one file.
#[derive(Default)]
pub struct Scope {
    /// From the root of the crate: `["api", "run"]`.
    pub path: Vec<String>,
    pub items: Vec<NamedItem>,
    /// Modules in files of their own: name, whether it exists only in tests.
    pub children: Vec<(String, bool)>,
    pub uses: Vec<Use>,
    pub mentions: Vec<Mention>,
    /// The functions and constants of inherent impls: path of the type, name.
    pub members: Vec<(Vec<String>, String)>,
}

pub struct NamedItem {
    pub name: String,
    pub line: usize,
    /// Struct, enum, trait, type or union.
    pub is_type: bool,
}

pub struct Use {
    pub path: Vec<String>,
    /// `None`: a glob.
    pub name: Option<String>,
    /// `pub use`, of any visibility.
    pub is_exported: bool,
    pub line: usize,
}

/// A path in code that may lead to an item of another file.
pub struct Mention {
    pub path: Vec<String>,
    /// `self.name()`: the last segment is a method of the type that the segments before it name.
    pub is_method: bool,
    pub line: usize,
}

/// `src/api/run.rs` is `api::run`. `src/main.rs` is a crate of its own: `main`.
pub fn module_of(file: &str) -> Vec<String> {
    let stem = file.trim_start_matches("src/").trim_end_matches(".rs").trim_end_matches("/mod");
    if stem == "lib" { Vec::new() } else { stem.split('/').map(str::to_owned).collect() }
}

/// `#[test]`, `#[tokio::test]`, `#[cfg(test)]` and `#[cfg(all(test, …))]`.
pub fn is_test(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        let last = attribute.path().segments.last().map(|segment| segment.ident.to_string());
        match (last.as_deref(), attribute.meta.require_list()) {
            (Some("test"), _) => true,
            (Some("cfg"), Ok(list)) => is_test_condition(&list.tokens.to_string()),
            _ => false,
        }
    })
}

fn is_test_condition(condition: &str) -> bool {
    let mut words = condition.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty());
    match words.next() {
        Some("test") => true,
        Some("all") => words.next() == Some("test"),
        _ => false,
    }
}

/// The tokens that ship: without comments, documentation and items that exist only in tests.
///
/// # Errors
/// If the text is not made of Rust tokens.
pub fn shipped_tokens(text: &str) -> Result<Vec<TokenTree>, String> {
    let mut shipped = Vec::new();
    add_shipped(text.parse().map_err(|e| format!("{e}"))?, &mut shipped);
    Ok(shipped)
}

/// A group is added, and then what stands in it.
fn add_shipped(tokens: TokenStream, shipped: &mut Vec<TokenTree>) {
    let is = |token: &TokenTree, c: char| matches!(token, TokenTree::Punct(punct) if punct.as_char() == c);
    let is_body = |token: &TokenTree| match token {
        TokenTree::Group(body) => body.delimiter() == Delimiter::Brace,
        _ => false,
    };
    let mut tokens = tokens.into_iter().peekable();
    while let Some(token) = tokens.next() {
        let is_attribute = is(&token, '#');
        if is_attribute {
            tokens.next_if(|next| is(next, '!'));
        }
        let attribute = match tokens.peek() {
            Some(TokenTree::Group(group)) if is_attribute => group.stream().to_string(),
            _ => String::new(),
        };
        if attribute.starts_with("doc =") {
            tokens.next();
        } else if attribute.strip_prefix("cfg").is_some_and(is_test_condition) {
            tokens.by_ref().skip(1).find(|next| is(next, ';') || is_body(next));
            tokens.next_if(|next| is(next, ';'));
        } else if let TokenTree::Group(group) = &token {
            let inside = group.stream();
            shipped.push(token);
            add_shipped(inside, shipped);
        } else {
            shipped.push(token);
        }
    }
}

/// The numbers of the lines with code that ships.
///
/// # Errors
/// As [`shipped_tokens`].
pub fn code_lines(text: &str) -> Result<BTreeSet<usize>, String> {
    let mut lines = BTreeSet::new();
    for token in shipped_tokens(text)? {
        match token {
            TokenTree::Group(group) => {
                lines.extend([group.span_open().start().line, group.span_close().end().line]);
            }
            token => lines.extend(token.span().start().line..=token.span().end().line),
        }
    }
    Ok(lines)
}

#[test]
fn only_lines_that_ship_count() {
    let text = r#"//! Doc.

use a::b;
#[cfg(test)]
use c::{
    d,
};
/// Doc.
fn f() {
    // why
    g("x
y");
}

#[cfg(test)]
mod tests {
    fn t() {}
}
#[cfg(not(test))]
fn last() {}
"#;
    let lines: Vec<usize> = code_lines(text).expect("tokens").into_iter().collect();
    assert_eq!(lines, [3, 9, 11, 12, 13, 19, 20]);
}
