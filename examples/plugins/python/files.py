"""Counts the files of a directory."""

import os

from warren_plugin import Plugin, PluginError


class Files(Plugin):
    name = "files"
    version = "1.0.0"

    def test(self, run):
        if not os.path.isdir(run.device["path"]):
            raise PluginError("%s is no directory" % run.device["path"], "NOT_FOUND")

    def collect(self, run):
        self.test(run)
        suffixes = tuple(run.json("config", "suffixes", []))
        sizes = []
        with os.scandir(run.device["path"]) as entries:
            for entry in entries:
                if entry.is_file() and (not suffixes or entry.name.endswith(suffixes)):
                    sizes.append(entry.stat().st_size)
        labels = {"path": run.device["path"]}
        run.add("files_count", len(sizes), labels=labels)
        run.add("files_size_bytes", sum(sizes), labels=labels)


if __name__ == "__main__":
    Files().run()
