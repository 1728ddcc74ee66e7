"""Measure any ``LanguageModel``, alone or against another: everything takes the protocol, nothing a file format."""
