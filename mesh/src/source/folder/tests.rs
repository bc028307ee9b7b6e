//! A running source against the ways in which a folder is written.

mod scan;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::Duration;

use tempfile::TempDir;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::*;
use crate::model::Model;
use crate::testing::{Doc, params, pod, text};

/// A running source of a temporary folder.
struct Running {
    dir: TempDir,
    store: Store,
    stop: CancellationToken,
    task: JoinHandle<Result<(), FolderError>>,
}

impl Running {
    #[expect(
        clippy::disallowed_methods,
        reason = "the test owns and joins the task"
    )]
    async fn start(docs: &[(&str, &[Doc])]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        for (file, docs) in docs {
            write(dir.path(), file, docs);
        }
        let store = Store::new();
        let source = FolderSource::new(dir.path(), params(), store.clone());
        let mut loaded = source.loaded();
        let stop = CancellationToken::new();
        let task = tokio::spawn(source.run(stop.clone()));
        timeout(TIMEOUT, loaded.wait_for(|loaded| *loaded))
            .await
            .unwrap()
            .unwrap();
        Self {
            dir,
            store,
            stop,
            task,
        }
    }

    async fn until(&self, condition: impl Fn(&Model) -> bool) {
        let mut version = self.store.subscribe();
        let reached = async {
            while !condition(&self.store.load()) {
                version.changed().await.unwrap();
            }
        };
        timeout(TIMEOUT, reached)
            .await
            .expect("the store follows the folder in time");
    }

    async fn end(self) {
        self.stop.cancel();
        timeout(TIMEOUT, self.task).await.unwrap().unwrap().unwrap();
    }
}

const TIMEOUT: Duration = Duration::from_secs(20);

fn write(dir: &Path, file: &str, docs: &[Doc]) {
    fs::write(dir.join(file), text(docs)).unwrap();
}

fn write_by_rename(dir: &Path, file: &str, docs: &[Doc]) {
    let hidden = dir.join(format!(".{file}.tmp"));
    fs::write(&hidden, text(docs)).unwrap();
    fs::rename(hidden, dir.join(file)).unwrap();
}

fn has(name: &str) -> impl Fn(&Model) -> bool {
    move |model| model.workloads().any(|w| *w.name == *name)
}

#[tokio::test]
async fn loaded_source_has_filled_the_store() {
    let running = Running::start(&[("a.yaml", &[pod("web", "10.0.0.1")])]).await;
    assert!(has("web")(&running.store.load()));
    running.end().await;
}

#[tokio::test]
async fn writes_renames_and_removals_update_the_store() {
    let running = Running::start(&[]).await;
    let dir = running.dir.path().to_owned();
    write(&dir, "a.yaml", &[pod("web", "10.0.0.1")]);
    running.until(has("web")).await;
    write_by_rename(&dir, "a.yaml", &[pod("db", "10.0.0.2")]);
    running.until(|m| has("db")(m) && !has("web")(m)).await;
    fs::create_dir(dir.join("sub")).unwrap();
    write(&dir.join("sub"), "b.yml", &[pod("new", "10.0.0.3")]);
    running.until(has("new")).await;
    fs::remove_file(dir.join("a.yaml")).unwrap();
    running.until(|m| !has("db")(m)).await;
    running.end().await;
}

#[tokio::test]
async fn removed_folder_keeps_its_last_state_and_is_read_when_recreated() {
    let running = Running::start(&[("a.yaml", &[pod("web", "10.0.0.1")])]).await;
    let dir = running.dir.path().to_owned();
    fs::remove_dir_all(&dir).unwrap();
    let lost = |m: &Model| {
        m.diagnostics()
            .iter()
            .any(|p| p.code == "folder_unreadable")
    };
    running.until(lost).await;
    assert!(
        has("web")(&running.store.load()),
        "the last state stays in use"
    );
    fs::create_dir(&dir).unwrap();
    write(&dir, "a.yaml", &[pod("db", "10.0.0.2")]);
    running.until(|m| has("db")(m) && !lost(m)).await;
    write(&dir, "b.yaml", &[pod("new", "10.0.0.3")]);
    running.until(has("new")).await;
    running.end().await;
}

#[tokio::test]
async fn missing_folder_at_start_is_an_error() {
    let source = FolderSource::new("/nonexistent/ambit", params(), Store::new());
    let error = source.run(CancellationToken::new()).await.unwrap_err();
    assert!(error.to_string().contains("/nonexistent/ambit"), "{error}");
}

/// An unreadable file may hold a policy that denies.
#[tokio::test]
async fn unreadable_file_at_start_is_retried_and_then_an_error() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), "a.yaml", &[pod("web", "10.0.0.1")]);
    symlink("..nowhere", dir.path().join("policy.yaml")).unwrap();
    let store = Store::new();
    let source = FolderSource::new(dir.path(), params(), store.clone());
    let loaded = source.loaded();
    let run = source.run(CancellationToken::new());
    let error = timeout(TIMEOUT, run).await.unwrap().unwrap_err();
    assert!(
        error.to_string().contains("policy.yaml#0: file_unreadable"),
        "{error}"
    );
    assert!(!*loaded.borrow() && store.load().workloads().next().is_none());
}

#[tokio::test]
async fn start_waits_for_a_file_that_becomes_readable() {
    let dir = tempfile::tempdir().unwrap();
    symlink("..late", dir.path().join("a.yaml")).unwrap();
    let store = Store::new();
    let source = FolderSource::new(dir.path(), params(), store.clone());
    let (stop, mut loaded) = (CancellationToken::new(), source.loaded());
    let write_late = async {
        write(dir.path(), "..late", &[pod("web", "10.0.0.1")]);
        loaded.wait_for(|loaded| *loaded).await.unwrap();
        stop.cancel();
    };
    let both = async { tokio::join!(source.run(stop.clone()), write_late).0 };
    timeout(TIMEOUT, both).await.unwrap().unwrap();
    assert!(has("web")(&store.load()));
}
