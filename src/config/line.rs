//! Finds the line of a setting in its file, for error messages.

use toml::de::{DeTable, DeValue};

/// The line (from 1) of the setting at `path` (`batch.linger_ms`, `limit[2].rate`), or of the longest part of
/// the path that the text contains. `None`: the text contains no part of it, or is not TOML.
pub fn line_of(text: &str, path: &str) -> Option<usize> {
    let document = DeTable::parse(text).ok()?;
    let mut table = document.get_ref();
    let mut at = None;
    for part in path.split('.') {
        let (name, index) = match part.split_once('[') {
            Some((name, index)) => (name, index.trim_end_matches(']').parse::<usize>().ok()),
            None => (part, None),
        };
        let Some((key, value)) = table.iter().find(|(key, _)| key.get_ref() == name) else { break };
        at = Some(key.span().start);
        let mut value = value;
        if let (Some(index), DeValue::Array(list)) = (index, value.get_ref()) {
            let Some(element) = list.get(index) else { break };
            at = Some(element.span().start);
            value = element;
        }
        match value.get_ref() {
            DeValue::Table(inner) => table = inner,
            _ => break,
        }
    }
    at.map(|offset| line_at(text, offset))
}

/// The line (from 1) of a byte offset in the text.
pub fn line_at(text: &str, offset: usize) -> usize {
    1 + text.bytes().take(offset).filter(|b| *b == b'\n').count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_found() {
        let text = "# a comment\n[batch]\nlinger_ms = 1\n\n[[limit]]\nname = \"a\"\n\
                    [[limit]]\nname = \"b\"\nrate = 0\n";
        for (path, line) in [
            ("batch", Some(2)),
            ("batch.linger_ms", Some(3)),
            ("batch.sends_max", Some(2)),
            ("limit[0]", Some(5)),
            ("limit[1].rate", Some(9)),
            ("limit[0].rate", Some(5)),
            ("cache.functions_max", None),
        ] {
            assert_eq!(line_of(text, path), line, "{path}");
        }
        assert_eq!(line_of("[", "batch"), None);
    }
}
