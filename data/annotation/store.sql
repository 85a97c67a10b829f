PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON;
CREATE TABLE IF NOT EXISTS setting (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS person (annotator TEXT PRIMARY KEY, token TEXT NOT NULL UNIQUE, items TEXT NOT NULL);

-- a log that only grows, one row per submission
CREATE TABLE IF NOT EXISTS change (annotator TEXT NOT NULL REFERENCES person, submission TEXT NOT NULL,
    item TEXT NOT NULL, row TEXT, skipped INTEGER NOT NULL, at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP,
    PRIMARY KEY (annotator, submission));

-- the current state, one row per person and item; position counts the items in the order they were first annotated
CREATE TABLE IF NOT EXISTS annotation (annotator TEXT NOT NULL REFERENCES person, item TEXT NOT NULL, row TEXT,
    skipped INTEGER NOT NULL, position INTEGER, PRIMARY KEY (annotator, item));
CREATE TRIGGER IF NOT EXISTS state AFTER INSERT ON change BEGIN
    INSERT INTO annotation
    SELECT new.annotator, new.item, new.row, new.skipped,
           CASE WHEN new.row NOTNULL THEN coalesce(max(position), 0) + 1 END
    FROM annotation WHERE annotator = new.annotator ON CONFLICT DO UPDATE SET
    row = excluded.row, skipped = excluded.skipped, position = coalesce(position, excluded.position);
END;
