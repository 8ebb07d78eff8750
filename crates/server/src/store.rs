//! What the server keeps through a crash: responses, files, batches and their results, jobs and their events.
//!
//! Contract: what was put is there after a kill, whole or not at all; each put is one transaction on disk before it
//! returns. Calls take milliseconds and belong off the threads that serve connections.

use std::{fs, io, path::Path};

use redb::{Database, DatabaseError, ReadableDatabase, ReadableTable, TableDefinition, backends::InMemoryBackend};
use serde_json::Value;

use crate::error::ApiError;

/// A kind of object, by id.
#[derive(Clone, Copy)]
pub(crate) struct Kind(TableDefinition<'static, &'static str, &'static [u8]>);

pub(crate) const RESPONSES: Kind = Kind(TableDefinition::new("responses"));
pub(crate) const FILES: Kind = Kind(TableDefinition::new("files"));
pub(crate) const BATCHES: Kind = Kind(TableDefinition::new("batches"));
pub(crate) const JOBS: Kind = Kind(TableDefinition::new("jobs"));
const CONTENTS: TableDefinition<&str, &[u8]> = TableDefinition::new("contents");
/// Lines of batches that are done: (batch, line) to its result.
const RESULTS: TableDefinition<(&str, u64), &[u8]> = TableDefinition::new("results");

/// Events of jobs: (job, number) to what happened.
const EVENTS: TableDefinition<(&str, u64), &[u8]> = TableDefinition::new("events");

/// The name of the database in its folder.
const FILE: &str = "server.redb";

/// The store.
pub(crate) struct Store {
    database: Database,
}

impl Store {
    /// The store in a folder, or one that ends with the server.
    ///
    /// # Errors
    /// When the folder cannot be used, or another server uses it.
    pub(crate) fn open(folder: Option<&Path>) -> Result<Store, io::Error> {
        let database = match folder {
            Some(folder) => {
                fs::create_dir_all(folder)?;
                let path = folder.join(FILE);
                Database::create(&path).map_err(|error| match error {
                    DatabaseError::DatabaseAlreadyOpen => io::Error::new(
                        io::ErrorKind::AlreadyExists,
                        format!("{} is in use by another server; give this one its own `--store`", path.display()),
                    ),
                    other => io::Error::other(format!("{}: {other}", path.display())),
                })?
            }
            None => Database::builder().create_with_backend(InMemoryBackend::new()).map_err(io::Error::other)?,
        };
        let store = Store { database };
        store.prepare().map_err(|error| io::Error::other(error.message))?;
        Ok(store)
    }

    /// Makes every table, so that reading finds one.
    fn prepare(&self) -> Result<(), ApiError> {
        let transaction = self.database.begin_write().map_err(failed)?;
        for kind in [RESPONSES, FILES, BATCHES, JOBS] {
            transaction.open_table(kind.0).map_err(failed)?;
        }
        transaction.open_table(CONTENTS).map_err(failed)?;
        transaction.open_table(RESULTS).map_err(failed)?;
        transaction.open_table(EVENTS).map_err(failed)?;
        transaction.commit().map_err(failed)
    }

    /// Keeps an object.
    pub(crate) fn put(&self, kind: Kind, id: &str, object: &Value) -> Result<(), ApiError> {
        let transaction = self.database.begin_write().map_err(failed)?;
        {
            let mut table = transaction.open_table(kind.0).map_err(failed)?;
            table.insert(id, object.to_string().as_bytes()).map_err(failed)?;
        }
        transaction.commit().map_err(failed)
    }

    /// The object of this id.
    pub(crate) fn get(&self, kind: Kind, id: &str) -> Result<Option<Value>, ApiError> {
        let transaction = self.database.begin_read().map_err(failed)?;
        let table = transaction.open_table(kind.0).map_err(failed)?;
        table.get(id).map_err(failed)?.map(|bytes| parsed(bytes.value())).transpose()
    }

    /// All objects of a kind.
    pub(crate) fn all(&self, kind: Kind) -> Result<Vec<Value>, ApiError> {
        let transaction = self.database.begin_read().map_err(failed)?;
        let table = transaction.open_table(kind.0).map_err(failed)?;
        table.iter().map_err(failed)?.map(|entry| parsed(entry.map_err(failed)?.1.value())).collect()
    }

    /// Forgets an object, and a file's content with it.
    pub(crate) fn remove(&self, kind: Kind, id: &str) -> Result<(), ApiError> {
        let transaction = self.database.begin_write().map_err(failed)?;
        {
            transaction.open_table(kind.0).map_err(failed)?.remove(id).map_err(failed)?;
            transaction.open_table(CONTENTS).map_err(failed)?.remove(id).map_err(failed)?;
        }
        transaction.commit().map_err(failed)
    }

    /// Keeps a file with its content.
    pub(crate) fn put_file(&self, id: &str, object: &Value, content: &[u8]) -> Result<(), ApiError> {
        self.put_files(&[(id, object, content)], None)
    }

    /// Keeps files and, in the same moment, a batch whose results they are.
    pub(crate) fn put_files(
        &self,
        files: &[(&str, &Value, &[u8])],
        batch: Option<(&str, &Value)>,
    ) -> Result<(), ApiError> {
        let transaction = self.database.begin_write().map_err(failed)?;
        {
            let mut objects = transaction.open_table(FILES.0).map_err(failed)?;
            let mut contents = transaction.open_table(CONTENTS).map_err(failed)?;
            for (id, object, content) in files {
                objects.insert(*id, object.to_string().as_bytes()).map_err(failed)?;
                contents.insert(*id, *content).map_err(failed)?;
            }
            if let Some((id, object)) = batch {
                let mut batches = transaction.open_table(BATCHES.0).map_err(failed)?;
                batches.insert(id, object.to_string().as_bytes()).map_err(failed)?;
                let mut results = transaction.open_table(RESULTS).map_err(failed)?;
                results.retain_in((id, 0)..=(id, u64::MAX), |_, _| false).map_err(failed)?;
            }
        }
        transaction.commit().map_err(failed)
    }

    /// A file's content.
    pub(crate) fn content(&self, id: &str) -> Result<Option<Vec<u8>>, ApiError> {
        let transaction = self.database.begin_read().map_err(failed)?;
        let table = transaction.open_table(CONTENTS).map_err(failed)?;
        Ok(table.get(id).map_err(failed)?.map(|bytes| bytes.value().to_vec()))
    }

    /// Keeps the result of a batch's line.
    pub(crate) fn put_result(&self, batch: &str, line: u64, result: &Value) -> Result<(), ApiError> {
        let transaction = self.database.begin_write().map_err(failed)?;
        {
            let mut table = transaction.open_table(RESULTS).map_err(failed)?;
            table.insert((batch, line), result.to_string().as_bytes()).map_err(failed)?;
        }
        transaction.commit().map_err(failed)
    }

    /// The lines of a batch that are done, in their order.
    pub(crate) fn results(&self, batch: &str) -> Result<Vec<(u64, Value)>, ApiError> {
        self.numbered(RESULTS, batch)
    }

    /// Keeps a job and, in the same moment, events of it, numbered from `first` on.
    pub(crate) fn put_job(&self, id: &str, job: &Value, first: u64, events: &[Value]) -> Result<(), ApiError> {
        let transaction = self.database.begin_write().map_err(failed)?;
        {
            let mut jobs = transaction.open_table(JOBS.0).map_err(failed)?;
            jobs.insert(id, job.to_string().as_bytes()).map_err(failed)?;
            let mut table = transaction.open_table(EVENTS).map_err(failed)?;
            for (number, event) in (first..).zip(events) {
                table.insert((id, number), event.to_string().as_bytes()).map_err(failed)?;
            }
        }
        transaction.commit().map_err(failed)
    }

    /// The events of a job, in their order.
    pub(crate) fn events(&self, job: &str) -> Result<Vec<Value>, ApiError> {
        Ok(self.numbered(EVENTS, job)?.into_iter().map(|(_, event)| event).collect())
    }

    /// What a table has of one object, in its order.
    fn numbered(
        &self,
        table: TableDefinition<(&'static str, u64), &'static [u8]>,
        id: &str,
    ) -> Result<Vec<(u64, Value)>, ApiError> {
        let transaction = self.database.begin_read().map_err(failed)?;
        let table = transaction.open_table(table).map_err(failed)?;
        let entries = table.range((id, 0)..=(id, u64::MAX)).map_err(failed)?;
        let entry = |entry: Result<_, redb::StorageError>| {
            let (key, bytes) = entry.map_err(failed)?;
            let key: redb::AccessGuard<'_, (&str, u64)> = key;
            let bytes: redb::AccessGuard<'_, &[u8]> = bytes;
            Ok((key.value().1, parsed(bytes.value())?))
        };
        entries.map(entry).collect()
    }
}

fn parsed(bytes: &[u8]) -> Result<Value, ApiError> {
    serde_json::from_slice(bytes).map_err(failed)
}

fn failed(error: impl std::fmt::Display) -> ApiError {
    ApiError::internal(format!("the server's store failed: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_was_put_is_there_when_opened_again() {
        let folder = tempfile::tempdir().unwrap();
        {
            let store = Store::open(Some(folder.path())).unwrap();
            store.put(RESPONSES, "a", &json!({"x": 1})).unwrap();
            store.put_file("f", &json!({"id": "f"}), b"content").unwrap();
            store.put_result("b", 2, &json!(2)).unwrap();
            store.put_result("b", 1, &json!(1)).unwrap();
            store.put_result("bb", 7, &json!(7)).unwrap();
            // A second server is told so, and the first goes on.
            let error = Store::open(Some(folder.path())).err().unwrap();
            assert!(error.to_string().contains("--store"), "{error}");
        }
        let store = Store::open(Some(folder.path())).unwrap();
        assert_eq!(store.get(RESPONSES, "a").unwrap(), Some(json!({"x": 1})));
        assert_eq!(store.content("f").unwrap().unwrap(), b"content");
        assert_eq!(store.results("b").unwrap(), [(1, json!(1)), (2, json!(2))]);
        store.put_files(&[("o", &json!({"id": "o"}), b"")], Some(("b", &json!({"status": "completed"})))).unwrap();
        assert_eq!((store.results("b").unwrap().len(), store.results("bb").unwrap().len()), (0, 1));
        store.remove(FILES, "f").unwrap();
        assert_eq!((store.get(FILES, "f").unwrap(), store.content("f").unwrap()), (None, None));
    }
}
