//! Reads the parts of Markdown documents that are compared with the code: headings, tables and fenced blocks.

/// A Markdown document.
#[derive(Default)]
pub struct Document {
    pub headings: Vec<Heading>,
    pub tables: Vec<Table>,
    pub blocks: Vec<Block>,
}

pub struct Heading {
    /// 1 for `#`.
    pub level: usize,
    pub text: String,
}

pub struct Table {
    /// The headings that it stands under, from the first level on.
    pub under: Vec<String>,
    /// The cells of the first row.
    pub header: Vec<String>,
    pub rows: Vec<Vec<String>>,
}

/// What stands between two fences.
pub struct Block {
    /// The number of the line of the first fence.
    pub line: usize,
    /// What follows that fence.
    pub info: String,
    pub text: String,
}

impl Block {
    pub fn language(&self) -> &str {
        self.info.split_whitespace().next().unwrap_or_default()
    }
}

impl Document {
    pub fn read(text: &str) -> Self {
        let mut document = Self::default();
        let mut under: Vec<Heading> = Vec::new();
        let mut in_block = false;
        let mut in_table = false;
        for (n, line) in text.lines().enumerate() {
            if let Some(info) = line.trim_start().strip_prefix("```") {
                if !in_block {
                    let block = Block { line: n + 1, info: info.trim().to_owned(), text: String::new() };
                    document.blocks.push(block);
                }
                in_block = !in_block;
            } else if let (true, Some(block)) = (in_block, document.blocks.last_mut()) {
                block.text.push_str(line);
                block.text.push('\n');
            } else if let Some(heading) = heading(line) {
                under.retain(|above| above.level < heading.level);
                under.push(Heading { level: heading.level, text: heading.text.clone() });
                document.headings.push(heading);
            }
            let is_row = !in_block && line.starts_with('|');
            match document.tables.last_mut().filter(|_| in_table && is_row) {
                Some(table) => table.rows.push(cells(line)),
                None if is_row => document.tables.push(Table {
                    under: under.iter().map(|heading| heading.text.clone()).collect(),
                    header: cells(line),
                    rows: Vec::new(),
                }),
                None => {}
            }
            in_table = is_row;
        }
        for table in &mut document.tables {
            table.rows.retain(|row| !row.iter().all(|cell| cell.chars().all(|c| "-: ".contains(c))));
        }
        document
    }
}

fn heading(line: &str) -> Option<Heading> {
    let text = line.trim_start_matches('#');
    let level = line.len() - text.len();
    (level > 0).then_some(())?;
    Some(Heading { level, text: text.strip_prefix(' ')?.trim().to_owned() })
}

/// `\|` and `|` between backticks do not end a cell.
fn cells(line: &str) -> Vec<String> {
    let mut cells = vec![String::new()];
    let (mut in_code, mut escaped) = (false, false);
    for c in line.trim().trim_start_matches('|').chars() {
        in_code ^= c == '`';
        if c == '|' && !in_code && !escaped {
            cells.push(String::new());
        } else if let Some(cell) = cells.last_mut() {
            cell.push(c);
        }
        escaped = c == '\\';
    }
    if cells.last().is_some_and(|last| last.trim().is_empty()) {
        cells.pop();
    }
    cells.iter().map(|cell| cell.trim().to_owned()).collect()
}

/// The texts between backticks.
pub fn code_in(text: &str) -> Vec<String> {
    text.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

#[test]
fn documents_are_read() {
    let text = r"# A
## `b.toml`

| key | type |
|---|:--:|
| `a.b` | one \| `x|y` |

```sh once
# no heading
| no | table |
```
### C
| x |
|---|
## D
| y |
";
    let document = Document::read(text);
    let headings: Vec<(usize, &str)> = document.headings.iter().map(|h| (h.level, h.text.as_str())).collect();
    assert_eq!(headings, [(1, "A"), (2, "`b.toml`"), (3, "C"), (2, "D")]);
    let [keys, x, y] = &document.tables[..] else { panic!("{} tables", document.tables.len()) };
    assert_eq!((keys.under.join(" "), keys.header.join(" ")), ("A `b.toml`".into(), "key type".into()));
    assert_eq!(keys.rows, [["`a.b`", "one \\| `x|y`"]]);
    assert_eq!((x.under.join(" "), y.under.join(" ")), ("A `b.toml` C".into(), "A D".into()));
    let [block] = &document.blocks[..] else { panic!("{} blocks", document.blocks.len()) };
    assert_eq!(
        (block.line, block.language(), block.text.as_str()),
        (8, "sh", "# no heading\n| no | table |\n")
    );
    assert_eq!(code_in("`a`, `b c` and d"), ["a", "b c"]);
}
