//! Functions: upload, update, tuning, deletion.

use crate::harness::http::{Answer, Request};
use crate::harness::job::now_ms;
use crate::harness::platform::HELLO;
use crate::harness::upload::{Part, form, printing, stored, zipped};
use crate::harness::worker::literal;
use crate::harness::{Gateway, SOON, Setup, eventually, join_all, spawn};
use serde_json::{Value, json};

on_all_workers!(a_function_is_uploaded_run_updated_and_deleted, multipart_updates_replace_code_and_fields,);
on_both_backends!(
    invalid_updates_are_rejected_and_change_nothing,
    memory_bounds_depend_on_the_runtime,
    one_of_many_concurrent_updates_with_one_etag_succeeds,
    conditional_requests_compare_etags,
    invalid_uploads_are_rejected,
    oversized_uploads_are_rejected_without_buffering,
    functions_are_listed_in_pages,
    auto_tuner_without_a_recommendation_is_409,
);

fn put(gateway: &Gateway, id: &str, change: &Value) -> Request {
    gateway.request("PUT", &format!("/functions/{id}")).json(change)
}

async fn etag(gateway: &Gateway, id: &str) -> String {
    gateway.get(&format!("/functions/{id}")).await.expect(200).need("etag").to_owned()
}

fn printed(result: &Value) -> &str {
    result["stdout"].as_str().unwrap_or_else(|| panic!("stdout in {result}"))
}

async fn a_function_is_uploaded_run_updated_and_deleted(setup: Setup) {
    let platform = setup.start().await;
    let gateway = &platform.gateway;
    let parts = [
        Part::Field("description", "für den Test"),
        Part::Field("envVars", r#"{"WHO":"me","N":1}"#),
        Part::File("my code.zip", &printing("first-code")),
        Part::Field("from-an-old-client", "ignored"),
    ];
    let request = gateway.request("POST", "/api/upload").header("x-runtime", "python");
    let request = request.header("x-memory-mb", "256").header("x-function-name", "gr%C3%BC%C3%9Fe");
    let made = form(request, &parts).send().await.expect(200);
    let tag = made.need("etag").to_owned();
    let id = made.json()["functionId"].as_str().expect("an id").to_owned();
    // Old clients rely on the exact bytes.
    let success = format!("{{\"success\":true,\"functionId\":\"{id}\"}}");
    assert_eq!(made.text(), success);

    let shown = gateway.get(&format!("/functions/{id}")).await.expect(200);
    assert_eq!(shown.need("etag"), tag);
    let shown = shown.json();
    assert_eq!(shown["name"], "grüße");
    assert_eq!(shown["description"], "für den Test");
    assert_eq!(
        (&shown["runtime"], &shown["memoryMb"], &shown["version"]),
        (&json!("python"), &json!(256), &json!(1))
    );
    let listed = gateway.get("/functions").await.expect(200).json();
    let listed = listed.as_array().expect("an array").iter().find(|f| f["functionId"] == *id);
    let listed = listed.unwrap_or_else(|| panic!("{id} is not listed"));
    assert_eq!((&listed["name"], &listed["invocations"]), (&json!("grüße"), &json!(0)));

    let result = gateway.run_code(&id).await;
    assert!(printed(&result).contains("first-code"), "{result}");
    assert_eq!(result["allocatedMemoryMb"], 256);

    // The next run uses the change.
    for memory in [512, 1024] {
        let changed = put(gateway, &id, &json!({ "memoryMb": memory })).send().await.expect(200);
        assert_ne!(changed.need("etag"), tag);
        assert_eq!(changed.text(), success);
        assert_eq!(gateway.run_code(&id).await["allocatedMemoryMb"], memory);
    }
    put(gateway, &id, &json!({ "description": "", "memory": 128 })).send().await.expect(200);
    let shown = gateway.get(&format!("/functions/{id}")).await.expect(200).json();
    assert_eq!(
        (&shown["description"], &shown["memoryMb"], &shown["version"]),
        (&json!(""), &json!(128), &json!(4))
    );
    assert_eq!(shown["name"], "grüße", "members that are not named stay");

    eventually("the sums of three runs", SOON, || async {
        let metrics = gateway.get(&format!("/functions/{id}/metrics")).await.expect(200).json();
        let fits = metrics["executions"] == 3 && metrics["errors"] == 0;
        let fits = fits && metrics["avgResponseTime"].as_f64().is_some_and(|ms| ms > 0.0);
        if fits { Ok(()) } else { Err(metrics.to_string()) }
    })
    .await;

    let gone = gateway.request("DELETE", &format!("/functions/{id}")).send().await.expect(200);
    assert_eq!(gone.text(), format!("{{\"success\":true,\"deletedId\":\"{id}\"}}"));
    for method in ["GET", "DELETE"] {
        gateway.request(method, &format!("/functions/{id}")).send().await.expect_problem(404);
    }
    gateway.run(&id, &json!(1)).send().await.expect_problem(404);
    let listed = gateway.get("/functions").await.expect(200).text();
    assert!(!listed.contains(&id), "{listed}");
    platform.finish().await;
}

async fn invalid_updates_are_rejected_and_change_nothing(setup: Setup) {
    let platform = setup.start().await;
    let gateway = &platform.gateway;
    let before = gateway.get("/functions/hello").await.expect(200);
    let deep = format!("{{\"memoryMb\":{}{}}}", "[".repeat(20_000), "]".repeat(20_000));
    let number = format!("{{\"memoryMb\":{}}}", "1".repeat(60_000));
    for (body, named) in [
        ("", "object"),
        ("{}", "empty"),
        ("null", "object"),
        ("[256]", "object"),
        ("{", ""),
        (r#"{"memoryMb":256}{"#, ""),
        (r#"{"memoryMb":31}"#, "memoryMb"),
        (r#"{"memory":10241}"#, "memory"),
        (r#"{"memoryMb":"256"}"#, "memoryMb"),
        (r#"{"memoryMb":256.5}"#, "memoryMb"),
        (r#"{"memoryMb":-256}"#, "memoryMb"),
        (r#"{"memoryMb":1e999}"#, "memoryMb"),
        (r#"{"memoryMb":null}"#, "memoryMb"),
        (r#"{"memoryMb":256,"memoryMb":256}"#, "memoryMb"),
        (r#"{"memoryMb":256,"memory":257}"#, "memory"),
        (r#"{"description":7}"#, "description"),
        (r#"{"description":"\ud800"}"#, "description"),
        (r#"{"description":"x","runtime":"go"}"#, "runtime"),
        (r#"{"s3Key":"functions/other/code.zip"}"#, "s3Key"),
        (&deep, "memoryMb"),
        (&number, "memoryMb"),
    ] {
        let request = gateway.request("PUT", "/functions/hello").body("application/json", body);
        let refused = request.send().await.expect_problem(400).json();
        let detail = refused["detail"].as_str().unwrap_or_default();
        assert!(detail.contains(named) && detail.len() < 500, "{body:.60} should name {named}: {detail}");
    }
    let huge = format!("{{\"description\":\"{}\"}}", "x".repeat(100_000));
    let huge = gateway.request("PUT", "/functions/hello").body("application/json", huge);
    huge.send().await.expect_problem(413);
    let typed = gateway.request("PUT", "/functions/hello").body("text/plain", r#"{"memoryMb":256}"#);
    typed.send().await.expect_problem(415);
    let after = gateway.get("/functions/hello").await.expect(200);
    assert_eq!((after.need("etag"), after.json()), (before.need("etag"), before.json()));

    // An unknown id is 404, and is not created.
    let count = async || gateway.get("/functions").await.expect(200).json().as_array().map(Vec::len);
    let functions = count().await;
    for change in [json!({ "memoryMb": 256 }), json!({ "description": "x" })] {
        put(gateway, "no-such-function", &change).send().await.expect_problem(404);
        put(gateway, "no-such-function", &change).header("if-match", "*").send().await.expect_problem(404);
    }
    for impossible in ["..", "%2e%2e", "a%2Fb", "config%23hello", "-x"] {
        put(gateway, impossible, &json!({ "memoryMb": 256 })).send().await.expect_problem(404);
    }
    gateway.get("/functions/no-such-function").await.expect_problem(404);
    assert_eq!(count().await, functions);
    if platform.is_serve() {
        assert!(platform.fleet().cloud.function_item("no-such-function").await.is_null());
    }
    platform.finish().await;
}

async fn multipart_updates_replace_code_and_fields(setup: Setup) {
    let platform = setup.start().await;
    let gateway = &platform.gateway;
    let id = gateway.upload("old-code").await;
    let key = async || {
        let function = gateway.get(&format!("/functions/{id}")).await.expect(200).json();
        function["s3Key"].as_str().expect("a key").to_owned()
    };
    let old_key = key().await;
    let request = || gateway.request("PUT", &format!("/functions/{id}"));
    let new = printing("new-code");
    let parts = [Part::File("new.zip", &new), Part::Field("memoryMb", "384")];
    form(request(), &parts).send().await.expect(200);
    let result = gateway.run_code(&id).await;
    assert!(printed(&result).contains("new-code"), "{result}");
    assert_eq!(result["allocatedMemoryMb"], 384);
    let new_key = key().await;
    assert_ne!(new_key, old_key, "queued jobs still find their code");

    let both = [Part::Field("memory", "320"), Part::Field("memoryMb", "320")];
    form(request(), &both).send().await.expect(200);
    assert_eq!(gateway.get(&format!("/functions/{id}")).await.expect(200).json()["memoryMb"], 320);
    form(request(), &[Part::Field("description", "by form")]).send().await.expect(200);
    let function = gateway.get(&format!("/functions/{id}")).await.expect(200).json();
    assert_eq!((&function["description"], &function["s3Key"]), (&json!("by form"), &json!(new_key)));

    let bad = zipped(&[("index.js", b"1")]);
    for parts in [
        &[][..],
        &[Part::Field("memoryMb", "lots")],
        &[Part::Field("memoryMb", "+256")],
        &[Part::Field("runtime", "go")],
        &[Part::Field("memory", "256"), Part::Field("memoryMb", "257")],
        &[Part::Field("description", "a"), Part::Field("description", "b")],
        &[Part::File("x.zip", &new), Part::File("y.zip", &new)],
        &[Part::File("x.zip", &bad)],
        &[Part::File("x.zip", b"no zip")],
        &[Part::File("x.zip", &new), Part::Field("memoryMb", "99999")],
    ] {
        form(request(), parts).send().await.expect_problem(400);
    }
    let unknown = gateway.request("PUT", "/functions/no-such-function");
    form(unknown, &[Part::File("x.zip", &new)]).send().await.expect_problem(404);
    assert_eq!(key().await, new_key);
    if platform.is_serve() {
        let mut expected = [old_key, new_key];
        expected.sort();
        assert_eq!(platform.stored_code(&id).await, expected, "rejected code is not stored");
    }
    platform.finish().await;
}

/// Recommendations of workers start at 32 MiB, and clients send them unchanged. New functions have 128 MiB or
/// more.
async fn memory_bounds_depend_on_the_runtime(setup: Setup) {
    let platform = setup.start().await;
    let gateway = &platform.gateway;
    for (runtime, file, most) in [
        ("python", "main.py", 10_240),
        ("nodejs", "index.js", 1_024),
        ("cpp", "main.cpp", 1_024),
        ("go", "main.go", 1_024),
    ] {
        let zip = zipped(&[(file, b"1")]);
        let upload = |mb: u64| {
            let request = gateway.request("POST", "/api/upload").header("x-runtime", runtime);
            form(request.header("x-memory-mb", &mb.to_string()), &[Part::File("x.zip", &zip)])
        };
        for mb in [1, 32, 127, most + 1] {
            let refused = upload(mb).send().await.expect_problem(400).json();
            let error = refused["error"].as_str().unwrap_or_default();
            assert!(error.contains(&format!("Invalid memoryMb for {runtime}")), "{mb}: {error}");
        }
        let made = upload(128).send().await.expect(200).json();
        let id = made["functionId"].as_str().expect("an id");
        for (change, given) in [
            (json!({ "memory": 32 }), Some(32)),
            (json!({ "memoryMb": 33 }), Some(33)),
            (json!({ "memory": most, "memoryMb": most }), Some(most)),
            (json!({ "memoryMb": 64.0, "memory": 64 }), Some(64)),
            (json!({ "memory": 31 }), None),
            (json!({ "memoryMb": most + 1 }), None),
            (json!({ "memory": 32, "memoryMb": 33 }), None),
        ] {
            let answer = put(gateway, id, &change).send().await;
            assert_eq!(answer.status, if given.is_some() { 200 } else { 400 }, "{runtime} {change}");
            if let Some(given) = given {
                let shown = gateway.get(&format!("/functions/{id}")).await.expect(200).json();
                assert_eq!(shown["memoryMb"], given, "{runtime} {change}");
            }
        }
    }
    platform.finish().await;
}

async fn one_of_many_concurrent_updates_with_one_etag_succeeds(setup: Setup) {
    const COUNT: u64 = 10;
    let platform = setup.start().await;
    let gateway = &platform.gateway;
    let id = gateway.upload("x").await;
    for round in 1..=5 {
        let tag = etag(gateway, &id).await;
        let changes = (0..COUNT).map(|n| {
            let change = json!({ "memoryMb": 128 + n, "description": format!("{round}-{n}") });
            let request = put(gateway, &id, &change).header("if-match", &tag);
            spawn(async move { request.send().await })
        });
        let answers: Vec<Answer> = join_all("the changes", SOON, changes.collect()).await;
        let winners: Vec<&Answer> = answers.iter().filter(|answer| answer.status == 200).collect();
        let [winner] = winners[..] else { panic!("{} winners", winners.len()) };
        let lost = answers.iter().filter(|answer| answer.status == 412).count();
        assert_eq!(lost, answers.len() - 1, "{answers:#?}");
        let function = gateway.get(&format!("/functions/{id}")).await.expect(200);
        assert_eq!(function.need("etag"), winner.need("etag"));
        assert_eq!(function.json()["version"], 1 + round);
    }
    // Without a condition all succeed, one after the other.
    let changes = (0..40).map(|n| {
        let request = put(gateway, &id, &json!({ "description": format!("all-{n}") }));
        spawn(async move { request.send().await.status })
    });
    let statuses = join_all("the changes", SOON, changes.collect()).await;
    assert!(statuses.iter().all(|status| *status == 200), "{statuses:?}");
    assert_eq!(gateway.get(&format!("/functions/{id}")).await.expect(200).json()["version"], 46);
    platform.finish().await;
}

async fn conditional_requests_compare_etags(setup: Setup) {
    let platform = setup.start().await;
    let gateway = &platform.gateway;
    let id = gateway.upload("x").await;
    let path = format!("/functions/{id}");
    let tag = etag(gateway, &id).await;
    for unchanged in [tag.clone(), format!("W/{tag}"), format!("\"x\", {tag}"), "*".to_owned()] {
        for method in ["GET", "HEAD"] {
            let answer =
                gateway.request(method, &path).header("if-none-match", &unchanged).send().await.expect(304);
            assert_eq!((answer.need("etag"), answer.body().len()), (tag.as_str(), 0));
        }
    }
    gateway.request("GET", &path).header("if-none-match", "\"x\"").send().await.expect(200);
    let change = json!({ "memoryMb": 512 });
    for stale in ["\"x\"", &format!("W/{tag}"), "x", ""] {
        let refused = put(gateway, &id, &change).header("if-match", stale).send().await.expect_problem(412);
        assert_eq!(refused.json()["code"], "precondition_failed");
        gateway.request("DELETE", &path).header("if-match", stale).send().await.expect_problem(412);
    }
    put(gateway, &id, &change).header("if-none-match", "*").send().await.expect_problem(412);
    assert_eq!(etag(gateway, &id).await, tag);
    let both = format!("\"x\", {tag}");
    put(gateway, &id, &change).header("if-match", &both).send().await.expect(200);
    gateway.request("GET", &path).header("if-none-match", &tag).send().await.expect(200);
    put(gateway, &id, &change).header("if-match", "*").send().await.expect(200);
    let tag = etag(gateway, &id).await;
    gateway.request("DELETE", &path).header("if-match", &tag).send().await.expect(200);
    platform.finish().await;
}

async fn invalid_uploads_are_rejected(setup: Setup) {
    let platform = setup.start().await;
    let gateway = &platform.gateway;
    let functions = gateway.get("/functions").await.expect(200).json();
    let good = printing("x");
    let other = zipped(&[("app/main.py", b"1")]);
    let escape = zipped(&[("main.py", b"1"), ("../../evil", b"1")]);
    let upload = || gateway.request("POST", "/upload");
    let file = [Part::File("x.zip", &good)];
    let bad_archive = |zip| (form(upload(), &[Part::File("x.zip", zip)]), "bad_archive");
    let invalid = |request| (request, "invalid_request");
    for (n, (request, code)) in [
        bad_archive(b""),
        bad_archive(b"no zip at all"),
        bad_archive(&good[..good.len() - 10]),
        bad_archive(&other),
        bad_archive(&escape),
        (form(upload().header("x-runtime", "nodejs"), &file), "bad_archive"),
        invalid(form(upload(), &[])),
        (form(upload(), &[Part::Field("file", "not a file part")]), "bad_archive"),
        invalid(form(upload(), &[Part::File("x.zip", &good), Part::File("y.zip", &good)])),
        invalid(form(upload().header("x-runtime", "ruby"), &file)),
        invalid(form(upload().header("x-memory-mb", "64"), &file)),
        invalid(form(upload().header("x-memory-mb", "2g"), &file)),
        invalid(form(upload().header("x-memory-mb", "20000"), &file)),
        invalid(form(upload().header("x-runtime", "go").header("x-memory-mb", "2048"), &file)),
        invalid(form(upload().header("x-function-name", "%ff"), &file)),
        invalid(form(upload().header("x-function-name", &"n".repeat(300)), &file)),
        invalid(form(upload(), &[Part::Field("envVars", "[]"), Part::File("x.zip", &good)])),
        invalid(form(upload(), &[Part::Field("envVars", r#"{"A":{}}"#), Part::File("x.zip", &good)])),
        invalid(form(upload(), &[Part::Field("description", &"d".repeat(5000)), Part::File("x.zip", &good)])),
        invalid(upload().body("multipart/form-data; boundary=x", "--y\r\n")),
        invalid(upload().body("multipart/form-data", "x")),
    ]
    .into_iter()
    .enumerate()
    {
        let refused = request.send().await;
        assert_eq!(refused.expect_problem(400).json()["code"], code, "case {n}");
    }
    for mime in ["application/zip", "application/json", "application/x-www-form-urlencoded"] {
        upload().body(mime, good.clone()).send().await.expect_problem(415);
    }
    gateway.anonymous("POST", "/upload").body("application/zip", "x").send().await.expect_problem(401);
    assert_eq!(gateway.get("/functions").await.expect(200).json(), functions, "no function was created");
    platform.finish().await;
}

async fn oversized_uploads_are_rejected_without_buffering(setup: Setup) {
    const CAP: usize = 50 << 20;
    let platform = setup.start().await;
    let gateway = &platform.gateway;
    gateway.upload("a first one").await;
    let before = gateway.peak_memory();
    // A declared length is rejected before the body is read.
    let head = gateway.request("POST", "/upload").header("content-type", "multipart/form-data; boundary=x");
    let declared = head.header("content-length", &(CAP + (1 << 20)).to_string());
    declared.send().await.expect_problem(413);
    // The file is too long, the form is not.
    let parts = [Part::File("x.zip", &vec![0; CAP + 1])];
    form(gateway.request("POST", "/upload"), &parts).send().await.expect_problem(413);
    // The maximum length: read to the end, but not a zip.
    let parts = [Part::File("x.zip", &vec![0; CAP])];
    let refused = form(gateway.request("POST", "/upload"), &parts).send().await.expect_problem(400);
    assert_eq!(refused.json()["code"], "bad_archive");
    // A large valid archive is stored, too.
    let noise: Vec<u8> = (0..40_u32 << 20).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let zip = stored(&[("main.py", b"print('large')"), ("noise", &noise)]);
    assert!(zip.len() > 40 << 20);
    form(gateway.request("POST", "/upload"), &[Part::File("x.zip", &zip)]).send().await.expect(200);
    let grown = gateway.peak_memory().saturating_sub(before);
    assert!(grown < 24 << 20, "no file is buffered in memory: {grown}");
    gateway.get("/livez").await.expect(200);
    platform.finish().await;
}

async fn functions_are_listed_in_pages(setup: Setup) {
    let platform = setup.start().await;
    let gateway = &platform.gateway;
    for n in 0..4 {
        gateway.upload(&n.to_string()).await;
    }
    let whole = gateway.get("/functions").await.expect(200);
    assert!(whole.header("link").is_none(), "old clients get all functions at once");
    let whole: Vec<Value> = serde_json::from_slice(whole.body()).expect("an array");
    assert!(whole.len() >= 5, "{whole:?}");
    for limit in [1, 2, 3, whole.len(), 1000, 5000] {
        let mut seen: Vec<Value> = Vec::new();
        let mut next = Some(format!("/api/functions?limit={limit}"));
        while let Some(target) = next {
            assert!(target.starts_with("/api/"), "{target}");
            let page = gateway.get(&target).await.expect(200);
            let rows: Vec<Value> = serde_json::from_slice(page.body()).expect("an array");
            assert!(!rows.is_empty() && rows.len() <= limit, "{limit}: {rows:?}");
            seen.extend(rows);
            next = next_of(&page);
        }
        assert_eq!(seen, whole, "{limit}");
    }
    let page = gateway.get("/functions?limit=1").await.expect(200);
    let target = next_of(&page).expect("a next page");
    let cursor = target.split("cursor=").nth(1).expect("a cursor");
    for bad in ["x", "", &cursor[1..], &format!("{cursor}A")] {
        let refused = gateway.get(&format!("/functions?cursor={bad}")).await.expect_problem(400);
        assert_eq!(refused.json()["code"], "bad_cursor");
    }
    gateway.get(&format!("/functions/{HELLO}/logs?cursor={cursor}")).await.expect_problem(400);
    for bad in ["limit=0", "limit=-1", "limit=x", "limit=1&limit=1", "limit=%ff"] {
        gateway.get(&format!("/functions?{bad}")).await.expect_problem(400);
    }
    platform.finish().await;
}

/// The target of the `Link` to the next page.
pub fn next_of(page: &Answer) -> Option<String> {
    let link = page.header("link")?;
    let (target, rel) = link.strip_prefix('<').and_then(|l| l.split_once('>')).expect("a link");
    assert_eq!(rel, "; rel=\"next\"");
    Some(target.to_owned())
}

async fn auto_tuner_without_a_recommendation_is_409(setup: Setup) {
    let platform = setup.start().await;
    let gateway = &platform.gateway;
    let tuner = gateway.get("/functions/hello/auto-tuner").await.expect(200).json();
    assert!(tuner["recommendedMemoryMb"].is_null() && tuner["memoryMb"].is_u64(), "{tuner}");
    let apply = gateway.request("POST", "/functions/hello/auto-tuner/apply").send().await.expect_problem(409);
    assert_eq!(apply.json()["code"], "no_recommendation");
    for (method, target) in [
        ("GET", "/functions/no-such-function/auto-tuner"),
        ("POST", "/functions/no-such-function/auto-tuner/apply"),
        ("GET", "/functions/no-such-function/metrics"),
    ] {
        gateway.request(method, target).send().await.expect_problem(404);
    }
    platform.finish().await;
}

/// The recommendation is shown and applied by another node than the one that received it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_node_applies_a_recommendation() {
    let platform = Setup::serve().python_worker().start().await;
    let (here, there) = (&platform.gateway, platform.fleet().start_gateway().await);
    let recommend = async |result: Value| {
        here.run(HELLO, &literal(&result.to_string())).send().await.expect(200);
    };
    let shown = async |wanted: u64| {
        eventually("the recommendation", SOON, || async {
            let tuner = there.get("/functions/hello/auto-tuner").await.expect(200).json();
            if tuner["recommendedMemoryMb"] == wanted { Ok(tuner) } else { Err(tuner.to_string()) }
        })
        .await
    };
    let result = |mb: u64| {
        json!({ "status": "SUCCESS", "exitCode": 0, "recommendedMemoryMb": mb, "optimizationTip": "less",
            "estimatedSavings": "30%" })
    };
    recommend(result(320)).await;
    let tuner = shown(320).await;
    assert_eq!((&tuner["memoryMb"], &tuner["optimizationTip"]), (&json!(256), &json!("less")));
    assert_eq!(tuner["estimatedSavings"], "30%");
    let tag = etag(&there, HELLO).await;
    let apply = there.request("POST", "/functions/hello/auto-tuner/apply");
    apply.clone().header("if-match", "\"x\"").send().await.expect_problem(412);
    let applied = apply.clone().header("if-match", &tag).send().await.expect(200);
    assert_ne!(applied.need("etag"), tag);
    assert_eq!(there.run(HELLO, &json!(1)).send().await.expect(200).json()["allocatedMemoryMb"], 320);
    // Applying it again changes nothing.
    let again = apply.clone().send().await.expect(200);
    assert_eq!(again.need("etag"), applied.need("etag"));
    // The change is announced. Without that the other node would read again after
    // `cache.function_backstop_s`, 300 s.
    eventually("the change on the other node", SOON, || async {
        let result = here.run(HELLO, &json!(1)).send().await.expect(200).json();
        if result["allocatedMemoryMb"] == 320 { Ok(()) } else { Err(result.to_string()) }
    })
    .await;
    // A recommendation out of bounds is clamped.
    for (recommended, applied) in [(1, 32), (40, 40), (99_999, 10_240)] {
        recommend(result(recommended)).await;
        shown(recommended).await;
        apply.send().await.expect(200);
        assert_eq!(there.get("/functions/hello").await.expect(200).json()["memoryMb"], applied);
    }
    there.finish().await;
    platform.finish().await;
}

/// Each change leaves a row with author and content that is not listed as an execution. Old code is kept, and
/// listed for deletion.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changes_are_recorded_and_old_code_is_listed_for_deletion() {
    let platform = Setup::serve().start().await;
    let gateway = &platform.gateway;
    let cloud = &platform.fleet().cloud;
    let parts = [Part::Field("envVars", r#"{"TOKEN":"hunter2"}"#), Part::File("code.zip", &printing("one"))];
    let made = form(gateway.request("POST", "/upload"), &parts).send().await.expect(200).json();
    let id = made["functionId"].as_str().expect("an id").to_owned();
    let begun_ms = now_ms();
    let s3_key = async || cloud.function_item(&id).await["s3Key"]["S"].as_str().expect("a key").to_owned();
    let first = s3_key().await;
    put(gateway, &id, &json!({ "memoryMb": 512 })).send().await.expect(200);
    let replace = gateway.request("PUT", &format!("/functions/{id}"));
    form(replace, &[Part::File("code.zip", &printing("two"))]).send().await.expect(200);
    let second = s3_key().await;
    // A rejected change leaves no record.
    put(gateway, &id, &json!({ "memoryMb": 1 })).send().await.expect(400);
    put(gateway, &id, &json!({ "memoryMb": 256 })).header("if-match", "\"x\"").send().await.expect(412);
    gateway.request("DELETE", &format!("/functions/{id}")).send().await.expect(200);

    let records = cloud.log_rows(&format!("config#{id}")).await;
    let text = |row: &Value, name: &str| row[name]["S"].as_str().unwrap_or_default().to_owned();
    let actions: Vec<String> = records.iter().map(|row| text(row, "action")).collect();
    assert_eq!(actions, ["CREATE", "UPDATE", "UPDATE", "DELETE"]);
    for row in &records {
        assert_eq!(text(row, "by"), "master");
        assert!(!row.to_string().contains("hunter2"), "{row}");
    }
    let json = |row: &Value, name: &str| -> Value { serde_json::from_str(&text(row, name)).expect("JSON") };
    assert_eq!(
        (&json(&records[1], "before")["memoryMb"], &json(&records[1], "after")["memoryMb"]),
        (&json!(128), &json!(512))
    );
    assert_eq!((&json(&records[0], "before"), &json(&records[3], "after")), (&Value::Null, &Value::Null));
    assert_eq!(gateway.get(&format!("/functions/{id}/logs")).await.expect(200).json(), json!([]));

    let list = cloud.log_rows("sweep#code").await;
    let mut listed: Vec<String> = list.iter().map(|row| text(row, "timestamp")).collect();
    listed.sort();
    let mut expected = [first.clone(), second.clone()];
    expected.sort();
    assert_eq!(listed, expected);
    let hour_ms = 3_600_000;
    for row in &list {
        // The queue keeps messages for an hour here, and an hour is added.
        let due: u64 = row["due"]["N"].as_str().and_then(|due| due.parse().ok()).expect("a time");
        assert!((begun_ms + 2 * hour_ms..=now_ms() + 2 * hour_ms).contains(&due), "{due}");
    }
    assert_eq!(platform.stored_code(&id).await, expected);
    platform.finish().await;
}
