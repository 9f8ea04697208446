//! Functions in script mode in processes that were started ahead, in real sandboxes.

use super::*;

/// A worker that keeps one interpreter ready.
async fn floor(scratch: &Scratch) -> Floor {
    let floor = Floor::start_with(scratch, |settings| {
        settings.sandboxed();
        settings.conf.warm.interpreters = 1;
    });
    floor.await
}

/// Runs a script until it has found an interpreter that was ready.
async fn warm(floor: &Floor, message: &Value) -> Value {
    floor.until_idle(1).await;
    let result = floor.succeed(message).await;
    assert_eq!(result["coldStart"], false, "{result}");
    result
}

#[tokio::test]
async fn a_run_finds_an_interpreter_and_another_takes_its_place() {
    let scratch = Scratch::new();
    let source = "import json, os, sys, time
open('/tmp/left', 'x').close()
time.sleep(0.3)  # so that its memory is measured
print(json.dumps([sys.argv, os.getcwd(), sorted(os.listdir('.')), os.environ['PAYLOAD']]))";
    install(&scratch, "main.py", source);
    install_as(&scratch, "g.zip", &[("main.py", "import lib; print(lib.x)"), ("lib.py", "x = 5")]);
    let floor = floor(&scratch).await;
    assert_eq!(floor.activity.pools().python, 0, "nothing was used yet");
    let first = floor.succeed(&message()).await;
    assert_eq!(first["coldStart"], true);
    for n in 0..3 {
        let result = warm(&floor, &with(json!({ "input": n }))).await;
        let seen: Value = serde_json::from_str(result["stdout"].as_str().unwrap()).unwrap();
        assert_eq!(seen, json!([["main.py"], "/function", ["main.py"], n.to_string()]));
        assert!(result["peakMemoryBytes"].as_u64().is_some_and(|bytes| bytes > 1 << 20), "{result}");
    }
    // Another function can have it, too.
    assert_eq!(warm(&floor, &with(json!({ "s3Key": "g.zip" }))).await["stdout"], "5\n");
    floor.stop().await;
}

#[tokio::test]
async fn a_variable_that_is_read_at_the_start_costs_a_cold_start() {
    let scratch = Scratch::new();
    install(&scratch, "main.py", "import os, sys; print(sys.flags.optimize, os.environ.get('TZ'))");
    let floor = floor(&scratch).await;
    floor.succeed(&message()).await;
    floor.until_idle(1).await;
    let cold = floor.succeed(&with(json!({ "envVars": { "PYTHONOPTIMIZE": "2" } }))).await;
    assert_eq!((&cold["coldStart"], &cold["stdout"]), (&json!(true), &json!("2 None\n")));
    let warm = warm(&floor, &with(json!({ "envVars": { "TZ": "Asia/Tokyo" } }))).await;
    assert_eq!(warm["stdout"], "0 Asia/Tokyo\n");
    floor.stop().await;
}

#[tokio::test]
async fn a_warm_run_has_the_limits_of_its_function() {
    let scratch = Scratch::new();
    install(&scratch, "main.py", "import time; x = b'x' * (100 << 20); time.sleep(0.3); print('done')");
    let floor = floor(&scratch).await;
    floor.succeed(&with(json!({ "memoryMb": 256 }))).await;
    let enough = warm(&floor, &with(json!({ "memoryMb": 512 }))).await;
    assert!(enough["peakMemoryBytes"].as_u64().unwrap() > 100 << 20, "{enough}");
    floor.until_idle(1).await;
    let few = floor.call(&with(json!({ "memoryMb": 64 }))).await;
    assert_eq!((&few["coldStart"], &few["exitCode"]), (&json!(false), &json!(137)), "{few}");
    assert!(stderr(&few).contains("its function has 64 MiB"), "{few}");
    floor.until_idle(1).await;
    install_as(&scratch, "slow.zip", &[("main.py", "import time; time.sleep(600)")]);
    let slow = floor.call(&with(json!({ "s3Key": "slow.zip", "timeoutMs": 1_000 }))).await;
    assert_eq!((&slow["coldStart"], &slow["exitCode"]), (&json!(false), &json!(124)), "{slow}");
    floor.stop().await;
}

#[tokio::test]
async fn many_files_and_long_inputs_arrive() {
    let scratch = Scratch::new();
    let source = "import json, os
path = os.environ.get('PAYLOAD_FILE')
text = open(path).read() if path else os.environ['PAYLOAD']
print(len(json.loads(text)), len([name for name in os.listdir('/function') if name.startswith('x')]))";
    let names: Vec<String> = (0..300).map(|n| format!("x{n}.txt")).collect();
    let mut files: Vec<(&str, &str)> = names.iter().map(|name| (name.as_str(), "x")).collect();
    files.push(("main.py", source));
    install_as(&scratch, "many.zip", &files);
    install(&scratch, "main.py", source);
    let floor = floor(&scratch).await;
    floor.succeed(&message()).await;
    let long = "x".repeat(200_000);
    let long = long.as_str();
    for (s3_key, input, expected) in
        [("many.zip", "x", "1 300\n"), ("many.zip", long, "200000 300\n"), ("f.zip", long, "200000 0\n")]
    {
        floor.until_idle(1).await;
        let result = floor.succeed(&with(json!({ "s3Key": s3_key, "input": input }))).await;
        assert_eq!(result["stdout"], expected, "{s3_key}");
    }
    floor.stop().await;
}

#[tokio::test]
async fn a_dead_interpreter_is_not_used() {
    let scratch = Scratch::new();
    install(&scratch, "main.py", "print('done')");
    let floor = floor(&scratch).await;
    floor.succeed(&message()).await;
    floor.until_idle(1).await;
    // The supervisors of this process that are not those of other tests: those of this user.
    let uid = floor.settings.get().sandbox.uid_first;
    let mut killed = 0;
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<i32>() else { continue };
        let status = fs::read_to_string(entry.path().join("status")).unwrap_or_default();
        let uids = status.lines().find_map(|line| line.strip_prefix("Uid:")).unwrap_or_default();
        let own: u32 = uids.split_whitespace().next().and_then(|id| id.parse().ok()).unwrap_or(0);
        if (uid..uid + UIDS_EACH).contains(&own) {
            let pid = nix::unistd::Pid::from_raw(pid);
            killed += u32::from(nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).is_ok());
        }
    }
    if killed == 0 {
        return floor.stop().await; // Not root: all functions have the user of the test.
    }
    assert_eq!(floor.succeed(&message()).await["stdout"], "done\n");
    floor.stop().await;
}

#[tokio::test]
async fn a_compiled_language_is_built_once() {
    let scratch = Scratch::new();
    let source = "#include <cstdlib>\n#include <iostream>\n\
                  int main() { std::cout << std::getenv(\"PAYLOAD\") << std::endl; return 3; }";
    install_as(&scratch, "good.zip", &[("main.cpp", source)]);
    install_as(&scratch, "bad.zip", &[("main.cpp", "int main() { return nothing; }")]);
    let floor = floor(&scratch).await;
    if on_path("g++").is_none() {
        let result = floor.call(&with(json!({ "runtime": "cpp", "s3Key": "good.zip" }))).await;
        assert!(stderr(&result).contains("this worker has no g++"), "{result}");
        return floor.stop().await;
    }
    for n in 0..2 {
        let result = floor.call(&with(json!({ "runtime": "cpp", "s3Key": "good.zip", "input": n }))).await;
        assert_eq!(
            (&result["exitCode"], &result["stdout"]),
            (&json!(3), &json!(format!("{n}\n"))),
            "{result}"
        );
        let bad = floor.call(&with(json!({ "runtime": "cpp", "s3Key": "bad.zip" }))).await;
        assert!(stderr(&bad).contains("could not be compiled") && stderr(&bad).contains("nothing"), "{bad}");
    }
    floor.stop().await;
}
