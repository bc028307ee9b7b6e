//! The folder as its writers treat it.

mod files;

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

/// A source that follows a folder, and is stopped with the test.
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
        timeout(SOON, loaded.wait_for(|loaded| *loaded))
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
        timeout(SOON, reached)
            .await
            .expect("the store follows the folder");
    }

    async fn end(self) {
        self.stop.cancel();
        timeout(SOON, self.task).await.unwrap().unwrap().unwrap();
    }
}

const SOON: Duration = Duration::from_secs(20);

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
async fn the_store_is_filled_when_the_source_says_so() {
    let running = Running::start(&[("a.yaml", &[pod("web", "10.0.0.1")])]).await;
    assert!(has("web")(&running.store.load()));
    running.end().await;
}

#[tokio::test]
async fn writes_in_place_renames_and_removals_are_followed() {
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
async fn a_folder_that_goes_leaves_its_last_state_and_is_followed_when_it_returns() {
    let running = Running::start(&[("a.yaml", &[pod("web", "10.0.0.1")])]).await;
    let dir = running.dir.path().to_owned();
    fs::remove_dir_all(&dir).unwrap();
    let lost = |m: &Model| {
        m.diagnostics()
            .iter()
            .any(|p| p.code == "folder_unreadable")
    };
    running.until(lost).await;
    assert!(has("web")(&running.store.load()), "the last state stays");
    fs::create_dir(&dir).unwrap();
    write(&dir, "a.yaml", &[pod("db", "10.0.0.2")]);
    running.until(|m| has("db")(m) && !lost(m)).await;
    write(&dir, "b.yaml", &[pod("new", "10.0.0.3")]);
    running.until(has("new")).await;
    running.end().await;
}

#[tokio::test]
async fn a_folder_that_is_not_there_at_the_start_is_an_error() {
    let source = FolderSource::new("/nonexistent/ambit", params(), Store::new());
    let error = source.run(CancellationToken::new()).await.unwrap_err();
    assert!(error.to_string().contains("/nonexistent/ambit"), "{error}");
}

/// It may hold the policy that denies.
#[tokio::test]
async fn a_start_waits_for_a_file_that_cannot_be_read_and_then_fails() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), "a.yaml", &[pod("web", "10.0.0.1")]);
    symlink("..nowhere", dir.path().join("policy.yaml")).unwrap();
    let store = Store::new();
    let source = FolderSource::new(dir.path(), params(), store.clone());
    let loaded = source.loaded();
    let ended = source.run(CancellationToken::new());
    let error = timeout(SOON, ended).await.unwrap().unwrap_err();
    assert!(
        error.to_string().contains("policy.yaml#0: file_unreadable"),
        "{error}"
    );
    assert!(!*loaded.borrow() && store.load().workloads().next().is_none());
}

#[tokio::test]
async fn a_file_that_can_be_read_in_time_is_waited_for() {
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
    timeout(SOON, both).await.unwrap().unwrap();
    assert!(has("web")(&store.load()));
}
