"""The `specialized` kernel set: deep fusion, a decode step in one kernel, an encoder in five launches a layer."""
