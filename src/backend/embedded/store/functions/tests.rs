use super::*;
use crate::backend::CodeList;
use crate::backend::embedded::scratch::{Scratch, in_time};
use crate::backend::embedded::store::SqliteCodeList;
use crate::model::{ConfigAction, Handler, RetiredCode, UnixMs, now_ms};

const AT: UnixMs = 1_795_305_600_123;

fn f() -> Function {
    Function::sample("f")
}

/// The next version of a function, with other memory.
fn changed(before: &Function, memory_mb: u64) -> Function {
    let (version, updated_at) = (before.version + 1, format!("change {}", before.version + 1));
    Function { memory_mb, version, updated_at, ..before.clone() }
}

fn change(before: Option<&Function>, after: Option<&Function>) -> FunctionWrite {
    let action = match (before, after) {
        (None, _) => ConfigAction::Create,
        (_, None) => ConfigAction::Delete,
        _ => ConfigAction::Update,
    };
    FunctionWrite {
        before: before.cloned(),
        after: after.cloned(),
        record: ConfigRecord::new(action, "tester", AT, before, after).unwrap(),
        retire: None,
        adopt: None,
    }
}

fn code(s3_key: &str, due: UnixMs) -> RetiredCode {
    RetiredCode { s3_key: s3_key.to_owned(), function: f().id, due }
}

async fn with_f(scratch: &Scratch) -> (SqliteFunctions, SqliteCodeList) {
    let database = scratch.database();
    let functions = SqliteFunctions(database.clone());
    assert_eq!(functions.write(&change(None, Some(&f()))).await, Ok(FunctionWriteOutcome::Done));
    (functions, SqliteCodeList(database))
}

/// Action, author, before and after of each record, ordered by key.
async fn records(functions: &SqliteFunctions) -> Vec<[String; 4]> {
    let read = functions.0.read(|c| {
        let mut select =
            c.prepare("SELECT action, changed_by, before, after FROM config_records ORDER BY key")?;
        let rows = select.query_map([], |row| Ok([row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?]))?;
        rows.collect()
    });
    read.await.unwrap()
}

#[tokio::test]
async fn a_change_is_written_with_its_record_and_code_entries() {
    let scratch = Scratch::new();
    let (functions, list) = with_f(&scratch).await;
    list.add(&code("new", 50)).await.unwrap();
    let after = Function {
        description: "other".into(),
        s3_key: "new".into(),
        original_name: "new.zip".into(),
        ..changed(&f(), 512)
    };
    let update = FunctionWrite {
        retire: Some(code("old", 70)),
        adopt: Some(code("new", 50)),
        ..change(Some(&f()), Some(&after))
    };
    assert_eq!(functions.write(&update).await, Ok(FunctionWriteOutcome::Done));
    drop((functions, list));

    let database = scratch.database();
    let (functions, list) = (SqliteFunctions(database.clone()), SqliteCodeList(database));
    assert_eq!(functions.get(&f().id).await, Ok(Some(after.clone())));
    assert_eq!(list.due(u64::MAX, 9).await.unwrap(), [code("old", 70)]);
    let mut delete = change(Some(&after), None);
    delete.record = ConfigRecord::new(ConfigAction::Delete, "tester", AT + 1, Some(&after), None).unwrap();
    assert_eq!(functions.write(&delete).await, Ok(FunctionWriteOutcome::Done));
    assert_eq!(functions.get(&f().id).await, Ok(None));
    let records = records(&functions).await;
    let actions: Vec<_> = records.iter().map(|[action, by, ..]| (action.as_str(), by.as_str())).collect();
    assert_eq!(actions, [("CREATE", "tester"), ("UPDATE", "tester"), ("DELETE", "tester")]);
    assert_eq!((records[0][2].as_str(), records[2][3].as_str()), ("null", "null"));
    assert!(records[1][2].contains("256") && records[1][3].contains("512"), "{records:?}");
}

#[tokio::test]
async fn a_change_writes_neither_counters_nor_recommendation() {
    let scratch = Scratch::new();
    let (functions, _) = with_f(&scratch).await;
    let sums = Sums { invocations: 3, errors: 1, ..Sums::default() };
    let counters = FunctionCounters { invocations: 3, errors: 1, ..FunctionCounters::default() };
    let advice = Recommendation { memory_mb: Some(1), at: 5, ..Recommendation::default() };
    // Both change after the function was read.
    functions.0.write(1, move |c| add_counters(c, &f().id, sums)).await.unwrap();
    functions.recommend(&f().id, &advice).await.unwrap();
    let other = Function { name: "x".into(), env_vars: "{\"A\":1}".into(), ..changed(&f(), 512) };
    assert_eq!(functions.write(&change(Some(&f()), Some(&other))).await, Ok(FunctionWriteOutcome::Done));
    let expected = Function { counters, recommendation: Some(advice), ..changed(&f(), 512) };
    assert_eq!(functions.get(&f().id).await, Ok(Some(expected.clone())));

    let mut again = change(Some(&expected), None);
    assert_eq!(functions.write(&again).await, Ok(FunctionWriteOutcome::Done));
    again = change(None, Some(&expected));
    assert_eq!(functions.write(&again).await, Ok(FunctionWriteOutcome::Done));
    let bare = Function { counters: FunctionCounters::default(), recommendation: None, ..expected };
    assert_eq!(functions.get(&f().id).await, Ok(Some(bare)), "a new function starts without counters");
}

#[tokio::test]
async fn a_handler_is_stored_and_cleared() {
    let scratch = Scratch::new();
    let functions = SqliteFunctions(scratch.database());
    let with = |handler: &str, version| Function { handler: Handler::parse(handler), version, ..f() };
    let states = [with("main.handler", 1), with("pkg.mod.fn", 2), with("", 3), with("main.handler", 4)];
    let mut before = None;
    for after in &states {
        assert_eq!(functions.write(&change(before, Some(after))).await, Ok(FunctionWriteOutcome::Done));
        assert_eq!(functions.get(&f().id).await, Ok(Some(after.clone())));
        before = Some(after);
    }
    let listed = functions.list(5, None).await.unwrap().functions;
    assert_eq!(listed, states[3..]);
}

#[tokio::test]
async fn of_concurrent_changes_one_succeeds() {
    let scratch = Scratch::new();
    let (functions, list) = with_f(&scratch).await;
    let read = functions.get(&f().id).await.unwrap().unwrap();
    let race = (0..40).map(|n| {
        let functions = &functions;
        let after = changed(&read, 300 + n);
        // Each has its own record and entry, so that those of a loser would be found.
        let mut write = change(Some(&read), Some(&after).filter(|_| n % 4 != 0));
        write.record.key.push_str(&n.to_string());
        write.retire = Some(code(&format!("old{n}"), n));
        async move { (n, functions.write(&write).await.unwrap()) }
    });
    let done = in_time(futures_util::future::join_all(race)).await;
    let won: Vec<u64> =
        done.into_iter().filter(|(_, w)| *w == FunctionWriteOutcome::Done).map(|(n, _)| n).collect();
    let [winner] = won[..] else { panic!("{won:?}") };
    let left = functions.get(&f().id).await.unwrap().map(|f| f.memory_mb);
    assert_eq!(left, (winner % 4 != 0).then_some(300 + winner));
    assert_eq!(list.due(u64::MAX, 99).await.unwrap(), [code(&format!("old{winner}"), winner)]);
    assert_eq!(records(&functions).await.len(), 2);
}

#[tokio::test]
async fn code_that_is_not_listed_is_not_adopted() {
    let scratch = Scratch::new();
    let (functions, list) = with_f(&scratch).await;
    list.add(&code("new", 60)).await.unwrap();
    let after = Function { s3_key: "new".into(), ..changed(&f(), 512) };
    for due in [50, 60] {
        let write = FunctionWrite { adopt: Some(code("new", due)), ..change(Some(&f()), Some(&after)) };
        let expected = if due == 60 { FunctionWriteOutcome::Done } else { FunctionWriteOutcome::Conflict };
        assert_eq!(functions.write(&write).await, Ok(expected), "{due}");
    }
    let again =
        FunctionWrite { adopt: Some(code("new", 60)), ..change(Some(&after), Some(&changed(&after, 1))) };
    assert_eq!(functions.write(&again).await, Ok(FunctionWriteOutcome::Conflict));
}

#[tokio::test]
async fn a_conflict_writes_nothing() {
    let scratch = Scratch::new();
    let (functions, list) = with_f(&scratch).await;
    list.add(&code("kept", 50)).await.unwrap();
    let (now, next) = (changed(&f(), 512), changed(&changed(&f(), 512), 1024));
    assert_eq!(functions.write(&change(Some(&f()), Some(&now))).await, Ok(FunctionWriteOutcome::Done));
    let conflict = async |before: Option<&Function>, after: Option<&Function>| {
        let known = (functions.get(&f().id).await, records(&functions).await);
        let mut write = change(before, after);
        write.record.key = "a conflict's".into();
        write.retire = Some(code("retired", 9));
        write.adopt = Some(code("kept", 50));
        assert_eq!(functions.write(&write).await, Ok(FunctionWriteOutcome::Conflict), "{write:?}");
        assert_eq!((functions.get(&f().id).await, records(&functions).await), known);
        assert_eq!(list.due(u64::MAX, 9).await.unwrap(), [code("kept", 50)]);
    };
    conflict(None, Some(&f())).await;
    conflict(Some(&f()), Some(&next)).await;
    conflict(Some(&f()), None).await;
    // The old controller changes `updated_at` without the version. Also the other way round.
    conflict(Some(&Function { updated_at: "earlier".into(), ..now.clone() }), Some(&next)).await;
    conflict(Some(&Function { version: 7, ..now.clone() }), None).await;
    assert_eq!(functions.write(&change(Some(&now), None)).await, Ok(FunctionWriteOutcome::Done));
    conflict(Some(&now), Some(&next)).await;
    conflict(Some(&now), None).await;
}

#[tokio::test]
async fn a_change_that_fails_leaves_nothing() {
    let scratch = Scratch::new();
    let (functions, _) = with_f(&scratch).await;
    functions.0.write(1, |c| c.execute_batch("DROP TABLE retired_code")).await.unwrap();
    let retire = Some(code("old", 1));
    let update = FunctionWrite { retire, ..change(Some(&f()), Some(&changed(&f(), 512))) };
    assert!(functions.write(&update).await.is_err());
    assert_eq!(functions.get(&f().id).await, Ok(Some(f())));
    assert_eq!(records(&functions).await.len(), 1);
}

#[tokio::test]
async fn pages_contain_every_function_once() {
    let scratch = Scratch::new();
    let functions = SqliteFunctions(scratch.database());
    assert_eq!(functions.list(5, None).await, Ok(FunctionPage::default()));
    for id in ["b", "B", "a.2", "a-1", "0", "z"] {
        assert_eq!(
            functions.write(&change(None, Some(&Function::sample(id)))).await,
            Ok(FunctionWriteOutcome::Done)
        );
    }
    for limit in 1..=7 {
        let (mut ids, mut after, mut pages) = (Vec::new(), None, 0);
        loop {
            let page = functions.list(limit, after.as_deref()).await.unwrap();
            ids.extend(page.functions.iter().map(|f| f.id.as_str().to_owned()));
            pages += 1;
            match page.next {
                Some(next) => after = Some(next),
                None => break,
            }
        }
        assert_eq!((ids.join(" ").as_str(), pages), ("0 B a-1 a.2 b z", 6_usize.div_ceil(limit)));
    }
    let gone = functions.list(2, Some("b-deleted")).await.unwrap();
    assert_eq!((gone.functions, gone.next), (vec![Function::sample("z")], None));
}

#[tokio::test]
async fn a_recommendation_of_an_earlier_execution_is_ignored() {
    let scratch = Scratch::new();
    let (functions, _) = with_f(&scratch).await;
    let advice = |at, tip: Option<&str>| Recommendation {
        memory_mb: tip.is_none().then_some(192),
        tip: tip.map(str::to_owned),
        savings: tip.map(|_| "\"30%\"".to_owned()),
        request_id: format!("run {at}"),
        at,
    };
    let (first, later) = (advice(AT, Some("less")), advice(AT + 1, None));
    for (received, kept) in [
        (&first, &first),
        (&advice(AT - 1, None), &first),
        (&later, &later),
        (&first, &later),
        (&later, &later),
    ] {
        functions.recommend(&f().id, received).await.unwrap();
        let known = functions.get(&f().id).await.unwrap().unwrap();
        assert_eq!(known, Function { recommendation: Some(kept.clone()), ..f() });
    }
    let nobody = FunctionId::parse("nobody").unwrap();
    functions.recommend(&nobody, &first).await.unwrap();
    assert_eq!(functions.get(&nobody).await, Ok(None), "a recommendation creates no function");
}

#[tokio::test]
async fn sums_are_added_to_existing_functions() {
    let scratch = Scratch::new();
    let (functions, _) = with_f(&scratch).await;
    let sums = Sums {
        invocations: 2,
        errors: 1,
        duration_us: 500,
        handler_invocations: 1,
        handler_us: 250,
        cold_starts: 2,
    };
    let nobody = FunctionId::parse("nobody").unwrap();
    for id in [f().id, f().id, nobody.clone()] {
        functions.0.write(1, move |c| add_counters(c, &id, sums)).await.unwrap();
    }
    let mut expected = f();
    expected.counters = FunctionCounters {
        invocations: 4,
        errors: 2,
        total_duration_ms: 1.0,
        handler_invocations: 2,
        total_handler_duration_ms: 0.5,
        cold_starts: 4,
    };
    drop(functions);
    let functions = SqliteFunctions(scratch.database());
    assert_eq!(functions.get(&f().id).await, Ok(Some(expected)));
    assert_eq!(functions.get(&nobody).await, Ok(None), "sums create no function");
    assert_eq!(functions.probe().await, Ok(()));
}

#[tokio::test]
async fn the_writer_deletes_expired_records() {
    let scratch = Scratch::new();
    let (functions, _) = with_f(&scratch).await;
    let mut update = change(Some(&f()), Some(&changed(&f(), 512)));
    update.record.expires_at_s = now_ms() / 1000 - 1;
    assert_eq!(functions.write(&update).await, Ok(FunctionWriteOutcome::Done));
    drop(functions);
    // A writer deletes expired rows as soon as it has started.
    let functions = SqliteFunctions(scratch.database());
    in_time(async {
        while records(&functions).await.len() != 1 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert_eq!(records(&functions).await[0][0], "CREATE");
}
