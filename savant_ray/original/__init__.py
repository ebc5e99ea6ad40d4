"""Checkpoint files of the original script: conversion into savant_ray checkpoints, and export from them.

The original is the training script that savant_ray reimplements as a Ray Train job.
"""
