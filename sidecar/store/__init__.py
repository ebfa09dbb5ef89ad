"""The store: loads the rows that commands name, saves what changed, appends the records; one transaction."""
