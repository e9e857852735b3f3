"""One router per file; each has a yaml of the same name in conf/model/router."""
