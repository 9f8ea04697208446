//! Reads a Rust file: its modules, items, imports, paths and the extents of its functions.

use super::source::{Mention, NamedItem, Scope, Source, Use, is_test, module_of};
use proc_macro2::{Delimiter, TokenStream, TokenTree};
use syn::visit::{self, Visit};
use syn::{Attribute, Block, Expr, ImplItem, Item, Signature, TraitItem, UseTree, Visibility};

impl Source {
    /// # Errors
    /// If the file is not Rust.
    pub fn read(file: &str, text: &str) -> Result<Self, String> {
        let parsed = syn::parse_file(text).map_err(|e| format!("{file}: {e}"))?;
        let scope = Scope { path: module_of(file), ..Scope::default() };
        let source = Self { file: file.to_owned(), scopes: vec![scope], ..Self::default() };
        let mut reader = Reader { source, at: 0, self_type: None, in_test: false };
        reader.visit_file(&parsed);
        Ok(reader.source)
    }
}

struct Reader {
    source: Source,
    /// The index of the scope that is being read.
    at: usize,
    /// The type of the impl that is being read.
    self_type: Option<Vec<String>>,
    /// Of tests only the extents of functions and modules are read.
    in_test: bool,
}

impl Reader {
    fn scope(&mut self) -> &mut Scope {
        &mut self.source.scopes[self.at]
    }

    fn mention(&mut self, mut path: Vec<String>, is_method: bool, line: usize) {
        if path.first().is_some_and(|first| first == "Self") {
            let Some(self_type) = &self.self_type else { return };
            path.splice(..1, self_type.iter().cloned());
        }
        if !self.in_test {
            self.scope().mentions.push(Mention { path, is_method, line });
        }
    }

    /// Reads something that may be marked as a test.
    fn marked(&mut self, attributes: &[Attribute], read: impl FnOnce(&mut Self)) {
        let before = self.in_test;
        self.in_test |= is_test(attributes);
        read(self);
        self.in_test = before;
    }

    fn function(&mut self, signature: &Signature, block: Option<&Block>) {
        let first = signature.fn_token.span.start().line;
        let end = block.map_or(signature.paren_token.span, |block| block.brace_token.span).close();
        self.source.functions.push((first, signature.ident.to_string(), end.end().line - first + 1));
    }

    fn item(&mut self, item: &Item) {
        let (ident, is_type) = match item {
            Item::Struct(item) => (&item.ident, true),
            Item::Enum(item) => (&item.ident, true),
            Item::Trait(item) => (&item.ident, true),
            Item::Type(item) => (&item.ident, true),
            Item::Union(item) => (&item.ident, true),
            Item::Fn(item) => (&item.sig.ident, false),
            Item::Const(item) => (&item.ident, false),
            Item::Static(item) => (&item.ident, false),
            _ => return,
        };
        let item = NamedItem { name: ident.to_string(), line: ident.span().start().line, is_type };
        self.scope().items.push(item);
    }

    fn module(&mut self, module: &syn::ItemMod) {
        let (name, in_test) = (module.ident.to_string(), self.in_test);
        let Some((brace, items)) = &module.content else {
            self.scope().children.push((name, in_test));
            return;
        };
        let before = self.at;
        if in_test {
            let first = module.mod_token.span.start().line;
            self.source.test_modules.push((first, brace.span.close().end().line - first + 1));
        } else {
            let path = [&self.scope().path[..], &[name]].concat();
            self.at = self.source.scopes.len();
            self.source.scopes.push(Scope { path, ..Scope::default() });
        }
        items.iter().for_each(|item| self.visit_item(item));
        self.at = before;
    }

    fn import(&mut self, prefix: &[String], tree: &UseTree, is_exported: bool) {
        let (last, name) = match tree {
            UseTree::Path(path) => {
                let prefix = [prefix, &[path.ident.to_string()]].concat();
                return self.import(&prefix, &path.tree, is_exported);
            }
            UseTree::Group(group) => {
                return group.items.iter().for_each(|tree| self.import(prefix, tree, is_exported));
            }
            UseTree::Name(name) => (Some(&name.ident), Some(&name.ident)),
            UseTree::Rename(rename) => (Some(&rename.ident), Some(&rename.rename)),
            UseTree::Glob(_) => (None, None),
        };
        let line = last.map_or(0, |last| last.span().start().line);
        let mut path = prefix.to_vec();
        path.extend(last.map(ToString::to_string).filter(|last| last != "self"));
        // `use a::{self}` binds `a`.
        let name = name.map(ToString::to_string);
        let name = if name.as_deref() == Some("self") { path.last().cloned() } else { name };
        self.scope().uses.push(Use { path, name, is_exported, line });
    }

    /// Reads the arguments of a macro or an attribute, which are not a syntax tree: every `a::b` counts as a
    /// path, and every `self.a(…)` as a call.
    fn tokens(&mut self, tokens: TokenStream) {
        let tokens: Vec<TokenTree> = tokens.into_iter().collect();
        let is = |n: usize, c: char| matches!(tokens.get(n), Some(TokenTree::Punct(p)) if p.as_char() == c);
        let word = |n: usize| match tokens.get(n) {
            Some(TokenTree::Ident(ident)) => Some(ident.to_string()),
            _ => None,
        };
        let is_call = |n: usize| match tokens.get(n) {
            Some(TokenTree::Group(group)) => group.delimiter() == Delimiter::Parenthesis,
            _ => false,
        };
        let mut n = 0;
        while n < tokens.len() {
            if let TokenTree::Group(group) = &tokens[n] {
                self.tokens(group.stream());
            }
            let line = tokens[n].span().start().line;
            let is_member = n > 0 && is(n - 1, '.') && !(n > 1 && is(n - 2, '.'));
            let first = word(n).filter(|_| !is_member);
            n += 1;
            let Some(first) = first else { continue };
            if let Some(method) = word(n + 1).filter(|_| first == "self" && is(n, '.') && is_call(n + 2)) {
                self.mention(vec!["Self".into(), method], true, line);
            }
            let mut path = vec![first];
            while let Some(next) = word(n + 2).filter(|_| is(n, ':') && is(n + 1, ':')) {
                path.push(next);
                n += 3;
            }
            self.mention(path, false, line);
        }
    }
}

impl<'ast> Visit<'ast> for Reader {
    fn visit_item(&mut self, item: &'ast Item) {
        self.marked(attributes(item), |reader| match item {
            Item::Mod(module) => reader.module(module),
            Item::Use(_) if reader.in_test => {}
            Item::Use(item) => {
                reader.import(&[], &item.tree, !matches!(item.vis, Visibility::Inherited));
            }
            item => {
                if !reader.in_test {
                    reader.item(item);
                }
                visit::visit_item(reader, item);
            }
        });
    }

    fn visit_item_fn(&mut self, item: &'ast syn::ItemFn) {
        self.function(&item.sig, Some(&item.block));
        visit::visit_item_fn(self, item);
    }

    fn visit_item_impl(&mut self, item: &'ast syn::ItemImpl) {
        let of = match &*item.self_ty {
            syn::Type::Path(path) => Some(segments(&path.path)),
            _ => None,
        };
        if let (Some(of), None, false) = (&of, &item.trait_, self.in_test) {
            for member in &item.items {
                let name = match member {
                    ImplItem::Fn(member) if !is_test(&member.attrs) => &member.sig.ident,
                    ImplItem::Const(member) => &member.ident,
                    _ => continue,
                };
                self.scope().members.push((of.clone(), name.to_string()));
            }
        }
        let before = std::mem::replace(&mut self.self_type, of);
        visit::visit_item_impl(self, item);
        self.self_type = before;
    }

    fn visit_impl_item(&mut self, item: &'ast ImplItem) {
        let ImplItem::Fn(function) = item else { return visit::visit_impl_item(self, item) };
        self.marked(&function.attrs, |reader| {
            reader.function(&function.sig, Some(&function.block));
            visit::visit_impl_item(reader, item);
        });
    }

    fn visit_trait_item(&mut self, item: &'ast TraitItem) {
        if let TraitItem::Fn(function) = item {
            self.function(&function.sig, function.default.as_ref());
        }
        visit::visit_trait_item(self, item);
    }

    fn visit_field(&mut self, field: &'ast syn::Field) {
        self.marked(&field.attrs, |reader| visit::visit_field(reader, field));
    }

    fn visit_field_value(&mut self, field: &'ast syn::FieldValue) {
        self.marked(&field.attrs, |reader| visit::visit_field_value(reader, field));
    }

    fn visit_expr_method_call(&mut self, call: &'ast syn::ExprMethodCall) {
        if matches!(&*call.receiver, Expr::Path(path) if path.path.is_ident("self")) {
            let line = call.method.span().start().line;
            self.mention(vec!["Self".into(), call.method.to_string()], true, line);
        }
        visit::visit_expr_method_call(self, call);
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let line = path.segments.first().map_or(0, |first| first.ident.span().start().line);
        self.mention(segments(path), false, line);
        visit::visit_path(self, path);
    }

    fn visit_macro(&mut self, call: &'ast syn::Macro) {
        self.tokens(call.tokens.clone());
    }

    fn visit_attribute(&mut self, attribute: &'ast Attribute) {
        let syn::Meta::List(list) = &attribute.meta else { return };
        self.tokens(list.tokens.clone());
        // Serde names functions in texts: `deserialize_with = "super::checks::networks"`.
        for token in list.tokens.clone().into_iter().filter(|_| list.path.is_ident("serde")) {
            let text = token.to_string();
            let path: Vec<String> = text.trim_matches('"').split("::").map(str::to_owned).collect();
            if text.starts_with('"') && path.len() > 1 {
                self.mention(path, false, token.span().start().line);
            }
        }
    }

    /// `pub(in crate::a)` uses nothing.
    fn visit_visibility(&mut self, _: &'ast Visibility) {}
}

fn segments(path: &syn::Path) -> Vec<String> {
    path.segments.iter().map(|segment| segment.ident.to_string()).collect()
}

fn attributes(item: &Item) -> &[Attribute] {
    match item {
        Item::Const(item) => &item.attrs,
        Item::Enum(item) => &item.attrs,
        Item::Fn(item) => &item.attrs,
        Item::Impl(item) => &item.attrs,
        Item::Macro(item) => &item.attrs,
        Item::Mod(item) => &item.attrs,
        Item::Static(item) => &item.attrs,
        Item::Struct(item) => &item.attrs,
        Item::Trait(item) => &item.attrs,
        Item::Type(item) => &item.attrs,
        Item::Use(item) => &item.attrs,
        _ => &[],
    }
}

#[test]
fn the_reader_sees_what_the_checks_need() {
    let text = r#"use a::{b as c, d::{self, *}};
pub(crate) use e::f;
impl G { fn h(&self) { self.i(j::K) } }
#[serde(with = "l::m")] struct N { o: p::Q }
fn r() {
    warn!(s = t::U, "{}", self.v());
}
#[cfg(test)]
mod tests {
    use w::X;
    fn y() {
    }
}
"#;
    let source = Source::read("src/api/run.rs", text).expect("Rust");
    let [scope] = &source.scopes[..] else { panic!("{} scopes", source.scopes.len()) };
    assert_eq!(scope.path, ["api", "run"]);
    let uses = scope.uses.iter().map(|import| {
        let name = import.name.as_deref().unwrap_or("*");
        format!("{} as {name}{}", import.path.join("::"), if import.is_exported { ", exported" } else { "" })
    });
    let expected = ["a::b as c", "a::d as d", "a::d as *", "e::f as f, exported"];
    assert_eq!(uses.collect::<Vec<_>>(), expected);
    let mentions: Vec<String> = scope.mentions.iter().map(|mention| mention.path.join("::")).collect();
    for expected in ["G::i", "j::K", "l::m", "p::Q", "t::U"] {
        assert!(mentions.iter().any(|mention| mention == expected), "{expected} is not in {mentions:?}");
    }
    assert_eq!(scope.members, [(vec!["G".to_owned()], "h".to_owned())]);
    assert_eq!(source.functions, [(3, "h".into(), 1), (5, "r".into(), 3), (11, "y".into(), 2)]);
    assert_eq!(source.test_modules, [(9, 5)]);
}
